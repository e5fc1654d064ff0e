"""TopK teachers on the native kernels against the reference in float64: sizes, tails, options, special values."""

import itertools

import pytest
import torch
from test_cpu_divergences import CASES, CUT, STANDARD, assert_agree

import mfd_fast as mfd
from mfd_fast.testing import distill_inputs

TAILS = ("bucket", "renormalize", "zero")
KINDS = [(tail, values_are) for tail in TAILS for values_are in ("logprobs", "logits")]
every_divergence = pytest.mark.parametrize("divergence", [*CASES, mfd.CrossEntropy()], ids=repr)
every_kind = pytest.mark.parametrize(("tail", "values_are"), KINDS, ids=["-".join(kind) for kind in KINDS])
OPTIONS = {
    "plain": {},
    "hard": {"hard_weight": 0.5, "label_smoothing": 0.1, "scale_by_temperature": False},
    "transform": {"student_transform": CUT, "hard_weight": 0.5, "label_smoothing": 0.1},
    "standardize": {"student_transform": STANDARD, "hard_weight": 0.5},
    "standardize_soft": {"student_transform": STANDARD},
}


def refused(divergence, tail, values_are, width, classes):
    """Whether the contract excludes the combination."""
    if tail == "renormalize" or width == classes:
        return False
    if tail == "zero" and divergence.needs_labels:
        return True
    alpha, beta = divergence.parameters
    infinite = isinstance(divergence, mfd.ReverseKL) or (
        isinstance(divergence, mfd.AlphaBeta) and (alpha <= 0 or alpha + beta <= 0)
    )
    return infinite and (tail == "zero" or values_are == "logits")


def sample(classes, width, *, rows=4, dtype=torch.float64, distance="far", seed=0, spread=2.0):
    """Arguments with the teacher's values, indices in no order; the label is listed, one row is ignored."""
    base = distill_inputs((rows, classes), distance=distance, dtype=dtype, seed=seed, spread=spread)
    rng = torch.Generator().manual_seed(seed)
    log_p = torch.log_softmax(base.teacher.double(), -1)
    order = torch.randperm(width, generator=rng)
    indices = log_p.topk(width, -1).indices[:, order]
    labels = indices[:, 0].clone()
    labels[rows // 2] = -100
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    temperature, other = (0.7 + 3 * torch.rand(2, rows, generator=rng, dtype=torch.float64)).to(exact)
    return {
        "student": base.student,
        "values": {"logprobs": log_p.gather(-1, indices).to(dtype), "logits": base.teacher.gather(-1, indices)},
        "indices": indices,
        "labels": labels,
        "temperature": temperature,
        "teacher_temperature": other,
    }


def in_float64(arguments):
    values = {k: v.double() for k, v in arguments["values"].items()}
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in {**arguments, "values": values}.items()}  # fmt: skip


def per_row(arguments, backend, tail, values_are, **options):
    """Loss per row and the gradients to the logits, the values and both temperatures."""
    leaves = [arguments[k].clone().requires_grad_() for k in ("student", "temperature", "teacher_temperature")]
    values = arguments["values"][values_are].clone().requires_grad_()
    student, temperature, other = leaves
    teacher = mfd.TopK(values, arguments["indices"], tail=tail, values_are=values_are)
    loss = mfd.distill_loss(
        student, teacher, arguments["labels"], temperature=temperature, teacher_temperature=other, reduction="none",
        backend=backend, **options,
    )  # fmt: skip
    ups = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, [student, values, temperature, other], ups)]


def scalar(arguments, backend, tail, values_are, **options):
    """The loss whose student gradient comes from the forward pass."""
    student = arguments["student"].clone().requires_grad_()
    teacher = mfd.TopK(arguments["values"][values_are], arguments["indices"], tail=tail, values_are=values_are)
    temperatures = {k: arguments[k].flatten()[0].item() for k in ("temperature", "teacher_temperature")}
    loss = mfd.distill_loss(
        student, teacher, arguments["labels"], reduction="sum", backend=backend, **{**temperatures, **options}
    )
    return [loss.detach(), torch.autograd.grad(loss, student)[0]]


@every_divergence
@every_kind
@pytest.mark.parametrize(("classes", "width"), [(1, 1), (9, 9), (9, 1), (70, 17), (2500, 1024)])
def test_topk_float64_sizes_on_cpu(divergence, tail, values_are, classes, width):
    if refused(divergence, tail, values_are, width, classes):
        return
    arguments = sample(classes, width)
    for call in (per_row, scalar):
        pair = [call(arguments, b, tail, values_are, divergence=divergence) for b in ("cpu", "reference")]
        assert_agree(*pair, f"{divergence} {tail} {values_are} C={classes} K={width} {call.__name__}")


@every_divergence
@every_kind
@pytest.mark.parametrize("options", OPTIONS)
def test_topk_float64_options_on_cpu(divergence, tail, values_are, options):
    if refused(divergence, tail, values_are, 7, 1100):
        return
    arguments = sample(1100, 7)
    for call in (per_row, scalar):
        for more in ({}, {"temperature": 1.0}) if call is scalar else ({},):
            pair = [
                call(arguments, b, tail, values_are, divergence=divergence, **OPTIONS[options], **more)
                for b in ("cpu", "reference")
            ]
            assert_agree(*pair, f"{divergence} {tail} {values_are} {options} {call.__name__}")


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_topk_narrow_dtypes_on_cpu(divergence, dtype):
    arguments = sample(1300, 64, dtype=dtype)
    exact, tolerance = in_float64(arguments), 2e-4 + 2 * torch.finfo(dtype).eps
    for (tail, values_are), call in itertools.product(KINDS, (per_row, scalar)):
        if refused(divergence, tail, values_are, 64, 1300):
            continue
        options = {"divergence": divergence, "hard_weight": 0.3}
        pair = (
            call(arguments, "cpu", tail, values_are, **options),
            call(exact, "reference", tail, values_are, **options),
        )
        # A gradient that cancels to 0 is measured by the others.
        floor = 1e-3 * max(float(b.abs().max()) for b in pair[1])
        for actual, truth in zip(*pair, strict=True):
            error = float((actual.double() - truth).abs().max())
            scale = max(float(truth.abs().max()), floor)
            assert error <= tolerance * scale, f"{divergence} {dtype} {tail} {values_are}: {error:.3e} at {scale:.3e}"


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@every_divergence
def test_topk_a_tiny_rest_keeps_its_digits_on_cpu(divergence, temperature):
    """The student's mass outside the list is far below the rounding of 1, as is the teacher's."""
    for gap in (25.0, 200.0):
        arguments = sample(40, 3, dtype=torch.float32)
        arguments["student"] = arguments["student"].scatter_add(-1, arguments["indices"], torch.full((4, 3), gap))
        if refused(divergence, "bucket", "logprobs", 3, 40):
            return
        options = {"divergence": divergence, "temperature": temperature}
        (loss, gradient), (exact, truth) = (
            scalar(a, b, "bucket", "logprobs", **options)
            for a, b in ((arguments, "cpu"), (in_float64(arguments), "reference"))
        )
        torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
        if not bool(loss.isfinite()):  # an exponent below 0 of so small a mass
            continue
        torch.testing.assert_close(gradient.double(), truth, rtol=2e-5, atol=1e-6 * float(truth.abs().max()))


@every_divergence
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_topk_special_rows_on_cpu(divergence, tail, values_are, dtype):
    """-inf listed or not, on one side or both, everything listed, extreme logits, NaN, +inf."""
    if refused(divergence, tail, values_are, 2, 5):
        return
    inf, nan = torch.inf, torch.nan
    far = 1e4 if divergence.parameters[1] >= 0 else 4e2  # what an exponent below 0 makes of it is still finite
    student = torch.tensor(
        [[1, 2, -inf, 0.5, 1], [1, -inf, 3, 0.5, 2], [1, 2, -inf, -inf, -inf], [900, 2, 3, 4, 1],
         [far, -far, 0, far / 2, 1], [1, nan, 2, 3, 0], [1, 2, nan, 3, 0], [inf, 2, 3, 1, 1], [-inf] * 5,
         [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], dtype=dtype)  # fmt: skip
    values = torch.tensor(
        [[-0.5, -1.5], [-0.7, -inf], [-0.7, -1.2], [-0.1, -3.0], [-0.3, -1.5], [-0.5, -1.5], [-0.5, -1.5],
         [-0.5, -1.5], [-0.5, -1.5], [nan, -1.5], [-0.5, inf]], dtype=dtype)  # fmt: skip
    indices = torch.tensor([[0, 1]]).expand(11, 2)
    labels = torch.zeros(11, dtype=torch.int64)
    found = []
    for backend, to in (("cpu", dtype), ("reference", torch.float64)):
        x = student.to(to).requires_grad_()
        teacher = mfd.TopK(values.to(to), indices, tail=tail, values_are=values_are)
        loss = mfd.distill_loss(
            x, teacher, labels, divergence=divergence, temperature=1.5, reduction="none", backend=backend
        )
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    (loss, gradient), (exact, truth) = found[0], (t.to(dtype) for t in found[1])
    near = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(loss, exact, **near, equal_nan=True)
    finite = exact.isfinite()
    torch.testing.assert_close(gradient[finite], truth[finite], **near)


@every_divergence
@every_kind
def test_topk_terms_and_by_products_on_cpu(divergence, tail, values_are):
    if refused(divergence, tail, values_are, 20, 1300):
        return
    arguments = sample(1300, 20)
    teacher = mfd.TopK(arguments["values"][values_are], arguments["indices"], tail=tail, values_are=values_are)
    call = {k: arguments[k] for k in ("student", "labels", "temperature", "teacher_temperature")}
    found = [mfd.distill_terms(**call, teacher=teacher, divergence=divergence, backend=b) for b in ("cpu", "reference")]
    for name, a, b in zip(found[0]._fields, *found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("tail", TAILS)
def test_topk_threads_give_the_same_bits_on_cpu(tail):
    arguments = sample(3000, 50, rows=31, dtype=torch.float32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(scalar(arguments, "cpu", tail, "logprobs", hard_weight=0.3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bad_lists_raise_before_any_work():
    student = torch.zeros(3, 6, requires_grad=True)
    values = torch.full((3, 2), -1.0)
    for row, message in (([1, 6], "in \\[0, 6\\), got 6 in row 1"), ([1, -1], "got -1 in row 1"),
                         ([4, 4], "got 4 twice in row 1")):  # fmt: skip
        indices = torch.tensor([[0, 1], row, [2, 3]])
        for options in ({}, {"reduction": "none"}):
            with pytest.raises(ValueError, match=message):
                mfd.distill_loss(student, mfd.TopK(values, indices), backend="cpu", **options)
        mask = torch.tensor([True, False, True])
        loss = mfd.distill_loss(student, mfd.TopK(values, indices), mask=mask, backend="cpu")
        assert bool(torch.autograd.grad(loss, student)[0][1].eq(0).all())
    labels = torch.tensor([0, 1, 5])
    with pytest.raises(ValueError, match=r"needs the label among teacher\.indices, got label 5 in row 2"):
        mfd.distill_loss(student, mfd.TopK(values, torch.tensor([[0, 1]] * 3)), labels, divergence="dkd", backend="cpu")


def test_classes_listed_in_many_rows_are_not_repeated():
    """More rows than a byte counts, for one worker, with lists that share their classes."""
    rows, classes, listed = 1200, 40, 8
    indices = torch.stack([(torch.arange(listed) * 3 + row % 5) % classes for row in range(rows)])
    values = torch.full((rows, listed), -3.0)
    student = torch.zeros(rows, classes)
    assert bool(mfd.distill_loss(student, mfd.TopK(values, indices), backend="cpu").isfinite())
    for row in (0, 255, 256, 257, rows - 1):
        bad = indices.clone()
        bad[row, -1] = bad[row, 2]
        with pytest.raises(ValueError, match=f"twice in row {row};"):
            mfd.distill_loss(student, mfd.TopK(values, bad), backend="cpu")
