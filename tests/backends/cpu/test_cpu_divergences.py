"""Every divergence on the native kernels against the reference in float64: sizes, threads, options, special values."""

import importlib

import pytest
import torch

import mfd_fast as mfd
from mfd_fast import codes
from mfd_fast.backends import cpu
from mfd_fast.divergences import DIVERGENCES
from mfd_fast.testing import distill_inputs

CASES = [
    mfd.ForwardKL(),
    mfd.ReverseKL(),
    mfd.JSD(0.5),
    mfd.JSD(0.1),
    mfd.SkewKL(0.1),
    mfd.SkewReverseKL(0.3),
    mfd.TVD(),
    mfd.AlphaBeta(0.3, 0.7),
    mfd.AlphaBeta(0.5, 0.9),
    mfd.AlphaBeta(0.5, 0.0),
    mfd.AlphaBeta(0.0, 0.5),
    mfd.AlphaBeta(0.5, -0.5),
    mfd.AlphaBeta(0.0, 0.0),
    mfd.AlphaBeta(2.0, -0.5),
    mfd.DKD(),
    mfd.DKD(2.0, 0.0),
    mfd.NKD(),
]
every_divergence = pytest.mark.parametrize("divergence", CASES, ids=repr)
CUT = mfd.LogitTransform(scale=0.5, softcap=5.0)
STANDARD = mfd.LogitTransform(softcap=6.0, standardize=True)
OPTIONS = {
    "plain": {},
    "weighted": {"hard_weight": 0.5, "label_smoothing": 0.1, "scale_by_temperature": False},
    "transforms": {"student_transform": CUT, "teacher_transform": CUT, "hard_weight": 0.5, "label_smoothing": 0.1},
    "standardize": {"student_transform": STANDARD, "teacher_transform": mfd.LogitTransform(standardize=True)},
}


def sample(classes, *, rows=5, distance="far", dtype=torch.float64, seed=0):
    base = distill_inputs((rows, classes), distance=distance, dtype=dtype, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    temperature, other = (0.7 + 3 * torch.rand(2, rows, generator=rng, dtype=torch.float64)).to(exact)
    labels = base.labels.clone()
    labels[rows // 2 :][:1] = -100
    return {
        "student": base.student,
        "teacher": base.teacher,
        "labels": labels,
        "temperature": temperature,
        "teacher_temperature": other,
    }


LEAVES = ("student", "teacher", "temperature", "teacher_temperature")


def per_row(arguments, backend, **options):
    """Loss per row and the gradients to both logits and both temperatures."""
    arguments = {k: v.clone().requires_grad_() if k in LEAVES else v for k, v in arguments.items()}
    loss = mfd.distill_loss(**arguments, **options, reduction="none", backend=backend)
    ups = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype)
    leaves = [arguments[k] for k in LEAVES]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, ups)]


def scalar(arguments, backend, **options):
    """The loss whose student gradient comes from the forward pass, at one temperature."""
    student = arguments["student"].clone().requires_grad_()
    numbers = {k: arguments[k].flatten()[0].item() for k in ("temperature", "teacher_temperature")}
    call = {**arguments, **numbers, "student": student}
    loss = mfd.distill_loss(**call, **options, reduction="sum", backend=backend)
    return [loss.detach(), torch.autograd.grad(loss, student)[0]]


def assert_agree(actual, exact, context, tolerance=1e-9):
    for name, a, b in zip(("loss", *LEAVES), actual, exact, strict=False):
        scale = float(b.abs().max()) if b.numel() else 0.0
        error = float((a.double() - b.double()).abs().max()) if b.numel() else 0.0
        assert error <= tolerance * scale + 1e-12, f"{context}: {name}: error {error:.3e} at scale {scale:.3e}"


def test_numbers_and_widths_are_those_of_the_native_module():
    native = cpu.native()
    assert set(codes.DIVERGENCES) == {*DIVERGENCES, "alpha_beta"}
    assert native.divergences == codes.DIVERGENCES
    assert native.dtypes == {str(dtype).removeprefix("torch."): code for dtype, code in codes.DTYPES.items()}
    assert native.tails == codes.TAILS
    assert native.feature_kinds == codes.FEATURE_KINDS
    assert native.statistics == codes.STATISTICS
    assert native.padding == codes.PADDING


def test_numbers_of_the_triton_kernels_are_those_of_python():
    tails = importlib.import_module("mfd_fast.kernels.triton.topk.values")
    assert {name: getattr(tails, name.upper()).value for name in codes.TAILS} == codes.TAILS
    arithmetic = importlib.import_module("mfd_fast.kernels.triton.rows.arithmetic")
    assert arithmetic.STATISTICS.value == codes.STATISTICS
    assert tails.PADDING.value == codes.PADDING


@every_divergence
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 1023, 1025, 2500])
def test_divergences_float64_sizes_on_cpu(divergence, classes):
    arguments = sample(classes)
    for call in (per_row, scalar):
        pair = [call(arguments, b, divergence=divergence, hard_weight=0.5) for b in ("cpu", "reference")]
        assert_agree(*pair, f"{divergence} C={classes} {call.__name__}")


@every_divergence
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("distance", ["far", "near"])
def test_divergences_float64_options_on_cpu(divergence, options, distance):
    arguments = sample(37, distance=distance)
    for call in (per_row, scalar):
        pair = [call(arguments, b, divergence=divergence, **OPTIONS[options]) for b in ("cpu", "reference")]
        assert_agree(*pair, f"{divergence} {options} {call.__name__}")


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_divergences_narrow_dtypes_on_cpu(divergence, dtype):
    """Within a few roundings of the float64 result of the same inputs."""
    arguments = sample(1100, rows=3, dtype=dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    tolerance = 1e-4 + 2 * torch.finfo(dtype).eps
    for call in (per_row, scalar):
        actual = call(arguments, "cpu", divergence=divergence)
        assert_agree(actual, call(exact, "reference", divergence=divergence), f"{divergence} {dtype}", tolerance)


@every_divergence
def test_a_row_shared_between_threads_is_bitwise_the_same(divergence):
    arguments = sample(20000, rows=3, dtype=torch.float32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(scalar(arguments, "cpu", divergence=divergence, hard_weight=0.3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    exact = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    assert_agree(found[0], scalar(exact, "reference", divergence=divergence, hard_weight=0.3), repr(divergence), 1e-4)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_near_teacher(divergence, dtype):
    """p close to q: no value below 0, and the gradient within 0.3 % of the exact one, as its dtype rounds it."""
    for seed in range(4):
        arguments = {**sample(257, distance="near", dtype=dtype, seed=seed), "divergence": divergence}
        arguments["teacher_temperature"] = arguments["temperature"] = torch.tensor(2.0)
        exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                 for k, v in arguments.items()}  # fmt: skip
        loss, gradient = scalar(arguments, "cpu")
        _, truth = scalar(exact, "reference")
        assert float(loss) >= 0
        error = (gradient.double() - truth.to(dtype).double()).norm() / truth.norm()
        assert float(error) <= 3e-3


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_divergences_special_rows_on_cpu(divergence, dtype):
    """-inf on both sides, on one side, a dominating label, extreme logits, NaN, +inf, a row of only -inf."""
    inf, nan = torch.inf, torch.nan
    student = torch.tensor(
        [[1, -inf, 3, 0.5], [1, 2, 3, -inf], [1, 2, 3, 4], [900, 2, 3, 4], [1e4, -1e4, 0, 5e3],
         [1, nan, 2, 3], [1, inf, 2, 3], [-inf] * 4, [1, 2, 3, 4]], dtype=dtype)  # fmt: skip
    teacher = torch.tensor(
        [[2, -inf, 1, 0.5], [1, 2, 3, 0.1], [1, -inf, 3, 4], [800, 2, 3, 4], [-1e4, 1e4, 3, 2e3],
         [1, 1, 2, 3], [1, 1, 2, 3], [1, 1, 2, 3], [1, nan, 2, 3]], dtype=dtype)  # fmt: skip
    labels = torch.zeros(9, dtype=torch.int64)
    found = []
    for backend, to in (("cpu", dtype), ("reference", torch.float64)):
        x = student.to(to).requires_grad_()
        loss = mfd.distill_loss(
            x, teacher.to(to), labels, divergence=divergence, temperature=1.5, reduction="none", backend=backend
        )
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    (loss, gradient), (exact, truth) = found[0], ((t.to(dtype)) for t in found[1])
    # exp(r) of r = 73, which float32 has with a spacing of 8e-6
    near = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    if isinstance(divergence, mfd.AlphaBeta) and divergence.alpha * divergence.beta < 0:
        assert float(loss[4]) == inf  # p^a q^b overflows
        exact[4] = inf
    torch.testing.assert_close(loss, exact, **near, equal_nan=True)
    assert bool(loss[5:].isnan().all())
    finite = exact.isfinite()
    torch.testing.assert_close(gradient[finite], truth[finite], **near)
    assert bool(gradient[~finite & exact.isnan()].isnan().all())


@every_divergence
def test_divergences_terms_and_by_products_on_cpu(divergence):
    arguments = sample(1300)
    found = [mfd.distill_terms(**arguments, divergence=divergence, backend=b) for b in ("cpu", "reference")]
    for name, a, b in zip(found[0]._fields, *found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_a_constant_row_is_standardised_to_zero():
    x = torch.full((1, 5), 3.0, requires_grad=True)
    y = torch.arange(5.0)[None]
    transform = mfd.LogitTransform(standardize=True)
    found = []
    for backend in ("cpu", "reference"):
        loss = mfd.distill_loss(x, y, student_transform=transform, divergence="jsd", backend=backend)
        found.append([loss.detach(), torch.autograd.grad(loss, x)[0]])
    assert_agree(*found, "constant", 1e-6)
