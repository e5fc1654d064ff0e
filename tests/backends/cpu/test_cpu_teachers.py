"""Several teachers on the native kernels against the reference in float64: sizes, options, dtypes, special values."""

import pytest
import torch
from test_cpu_divergences import CASES, OPTIONS, assert_agree

import mfd_fast as mfd
from mfd_fast.testing import distill_inputs

every_divergence = pytest.mark.parametrize("divergence", CASES, ids=repr)


def sample(classes, *, teachers=3, rows=5, dtype=torch.float64, distance="far", seed=0, shared=False):
    """Teachers as far from the student as ``distance`` says; weights per row or ``shared``; one row is ignored."""
    base = distill_inputs((rows, classes), distance=distance, dtype=dtype, seed=seed)
    step = base.teacher - base.student
    rng = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    temperature, other = (0.7 + 3 * torch.rand(2, rows, generator=rng, dtype=torch.float64)).to(exact)
    labels = base.labels.clone()
    labels[rows // 2 :][:1] = -100
    weights = 0.1 + torch.rand(rows, teachers, generator=rng, dtype=torch.float64)
    return {
        "student": base.student,
        "teacher": [base.student + step.roll(k, -1) for k in range(teachers)],
        "labels": labels,
        "temperature": temperature,
        "teacher_temperature": other,
        "teacher_weights": (weights[0] if shared else weights).to(exact),
    }


def in_float64(arguments):
    def wide(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {k: [wide(t) for t in v] if isinstance(v, list) else wide(v) for k, v in arguments.items()}


def per_row(arguments, backend, **options):
    """Loss per row and the gradients to all logits, both temperatures and the weights."""
    names = ("student", "temperature", "teacher_temperature", "teacher_weights")
    leaves = {k: arguments[k].clone().requires_grad_() for k in names}
    teachers = [t.clone().requires_grad_() for t in arguments["teacher"]]
    call = {**arguments, **leaves, "teacher": teachers}
    loss = mfd.distill_loss(**call, **options, reduction="none", backend=backend)
    ups = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, [*leaves.values(), *teachers], ups)]


def scalar(arguments, backend, **options):
    """The loss whose student gradient comes from the forward pass, at one temperature."""
    student = arguments["student"].clone().requires_grad_()
    numbers = {k: arguments[k].flatten()[0].item() for k in ("temperature", "teacher_temperature")}
    loss = mfd.distill_loss(**{**arguments, **numbers, "student": student}, **options, reduction="sum", backend=backend)
    return [loss.detach(), torch.autograd.grad(loss, student)[0]]


def assert_all_agree(actual, exact, context, tolerance=1e-9):
    """Each within ``tolerance`` of the largest of all: a gradient may cancel to nothing."""
    floor = 1e-3 * max((float(b.abs().max()) for b in exact if b.numel()), default=0.0)
    for number, (a, b) in enumerate(zip(actual, exact, strict=True)):
        error = float((a.double() - b).abs().max()) if b.numel() else 0.0
        scale = max(float(b.abs().max()) if b.numel() else 0.0, floor)
        assert error <= tolerance * scale + 1e-12, f"{context}: {number}: error {error:.3e} at scale {scale:.3e}"


@every_divergence
@pytest.mark.parametrize(("classes", "teachers"), [(1, 2), (2, 3), (17, 2), (1025, 5), (2500, 2)])
def test_teachers_float64_sizes_on_cpu(divergence, classes, teachers):
    arguments = sample(classes, teachers=teachers)
    for call in (per_row, scalar):
        pair = [call(arguments, b, divergence=divergence, hard_weight=0.5) for b in ("cpu", "reference")]
        assert_all_agree(*pair, f"{divergence} C={classes} {call.__name__}")


@every_divergence
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("distance", ["far", "near"])
def test_teachers_float64_options_on_cpu(divergence, options, distance):
    arguments = sample(37, distance=distance, shared=True)
    for call in (per_row, scalar):
        for weights in (arguments["teacher_weights"], None):
            if weights is None and call is per_row:
                continue
            given = {**arguments, "teacher_weights": weights}
            pair = [call(given, b, divergence=divergence, **OPTIONS[options]) for b in ("cpu", "reference")]
            assert_all_agree(*pair, f"{divergence} {options} {call.__name__}")


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_teachers_narrow_dtypes_on_cpu(divergence, dtype):
    """Within a few roundings of the float64 result of the same inputs; teachers of three dtypes and widths."""
    arguments = sample(1100, rows=3, dtype=dtype)
    arguments["teacher"][1] = arguments["teacher"][1].float()
    tolerance = 2e-4 + 2 * torch.finfo(dtype).eps
    for call in (per_row, scalar):
        actual = call(arguments, "cpu", divergence=divergence)
        exact = call(in_float64(arguments), "reference", divergence=divergence)
        assert_all_agree(actual, exact, f"{divergence} {dtype}", tolerance)


@every_divergence
def test_teachers_terms_and_by_products_on_cpu(divergence):
    arguments = sample(1300)
    found = [mfd.distill_terms(**arguments, divergence=divergence, backend=b) for b in ("cpu", "reference")]
    for name, a, b in zip(found[0]._fields, *found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@every_divergence
def test_teachers_threads_give_the_same_bits_on_cpu(divergence):
    arguments = sample(20000, rows=3, dtype=torch.float32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([*scalar(arguments, "cpu", divergence=divergence), *per_row(arguments, "cpu")])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_teachers_special_rows_on_cpu(divergence, dtype):
    """One teacher is 0 where the other is not, both are, weights of 0, extreme logits, NaN, +inf, only -inf."""
    inf, nan = torch.inf, torch.nan
    student = torch.tensor([[1, 2, 3, 0.5]] * 9, dtype=dtype)
    student[1, 1] = -inf
    first = torch.tensor(
        [[2, -inf, 1, 0.5], [2, -inf, 1, 0.5], [1, 2, 3, 4], [300, 2, 3, 4], [1, 2, 3, 4],
         [nan, 1, 2, 3], [inf, 1, 2, 3], [-inf] * 4, [1, 2, 3, 4]], dtype=dtype)  # fmt: skip
    second = torch.tensor(
        [[2, 3, 1, 0.5], [1, -inf, 2, 0.5], [-inf, 2, 3, 4], [2, 300, 4, 3], [4, 3, 2, 1],
         [1, 1, 2, 3], [1, 1, 2, 3], [1, 1, 2, 3], [1, nan, 2, 3]], dtype=dtype)  # fmt: skip
    weights = torch.tensor([[1, 1]] * 4 + [[1, 0]] + [[0, 1]] * 3 + [[1, 0]], dtype=dtype)
    labels = torch.zeros(9, dtype=torch.int64)
    found = []
    for backend, to in (("cpu", dtype), ("reference", torch.float64)):
        leaves = [t.to(to).requires_grad_() for t in (student, first, second)]
        loss = mfd.distill_loss(
            leaves[0], leaves[1:], labels, teacher_weights=weights.to(to), divergence=divergence, temperature=1.5,
            reduction="none", backend=backend,
        )  # fmt: skip
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    (loss, *gradients), (exact, *truths) = found[0], (t.to(dtype) for t in found[1])
    near = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(loss, exact, **near, equal_nan=True)
    assert bool(loss[5:].isnan().all())
    finite = exact.isfinite()
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient[finite], truth[finite], **near)


def test_a_teacher_that_needs_no_gradient_gets_none():
    arguments = sample(9)
    first, second, third = (t.clone() for t in arguments["teacher"])
    second.requires_grad_()
    loss = mfd.distill_loss(arguments["student"], [first, second, third], divergence="jsd", backend="cpu")
    (gradient,) = torch.autograd.grad(loss, [second])
    exact = second.detach().clone().requires_grad_()
    value = mfd.distill_loss(arguments["student"], [first, exact, third], divergence="jsd", backend="reference")
    assert_agree([loss.detach(), gradient], [value.detach(), torch.autograd.grad(value, exact)[0]], "second")


def test_teachers_of_different_widths():
    """Padded vocabularies: each side has columns that are not used, and zeros in its gradient there."""
    arguments = sample(12, dtype=torch.float32)
    cut = mfd.LogitTransform(classes=9, softcap=8.0)
    arguments["teacher"][2] = torch.cat([arguments["teacher"][2], torch.full((5, 4), torch.nan)], -1)
    options = {"student_transform": cut, "teacher_transform": cut}
    arguments["labels"] %= 9
    arguments["labels"][2] = -100
    found = per_row(arguments, "cpu", **options)
    assert_all_agree(found, per_row(in_float64(arguments), "reference", **options), "widths", 1e-4)
    assert not bool(found[-1][:, 9:].any())
