"""TopK teachers on the Triton kernels against the reference in float64: tails, sizes, options, bad lists."""

import pytest
import torch
from test_cpu_divergences import CUT, STANDARD, assert_agree
from test_cpu_topk import every_kind, in_float64, per_row, refused, sample, scalar

import mfd_fast as mfd
from mfd_fast.backends.triton import distill_loss

DIVERGENCES = [
    mfd.ForwardKL(),
    mfd.CrossEntropy(),
    mfd.ReverseKL(),
    mfd.JSD(0.3),
    mfd.SkewKL(0.2),
    mfd.SkewReverseKL(0.2),
    mfd.TVD(),
    mfd.AlphaBeta(0.6, 0.3),
    mfd.DKD(0.7, 2.0),
    mfd.NKD(0.8),
]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
OPTIONS = {
    "hard": {"hard_weight": 0.5, "label_smoothing": 0.1, "scale_by_temperature": False},
    "transform": {"student_transform": CUT, "hard_weight": 0.5, "label_smoothing": 0.1},
    "standardize": {"student_transform": STANDARD, "hard_weight": 0.5},
}


def agree(arguments, context, tail, values_are, calls=(per_row, scalar), **options):
    for call in calls:
        pair = [call(arguments, b, tail, values_are, **options) for b in ("triton", "reference")]
        assert_agree(*pair, f"{context} {call.__name__}")


@every_divergence
@every_kind
def test_topk_float64_on_triton(divergence, tail, values_are):
    """All classes listed, one, some of a row of several tiles."""
    for classes, width in ((9, 9), (9, 1), (600, 5)):
        if refused(divergence, tail, values_are, width, classes):
            continue
        calls = (per_row if values_are == "logprobs" else scalar,)  # interpreting is slow
        agree(sample(classes, width, rows=2), f"C={classes} K={width}", tail, values_are, calls, divergence=divergence)


@pytest.mark.parametrize("divergence", [mfd.JSD(0.3), mfd.DKD(0.7, 2.0), mfd.NKD(0.8)], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
@pytest.mark.parametrize("options", OPTIONS)
def test_topk_float64_options_on_triton(divergence, tail, options):
    if refused(divergence, tail, "logprobs", 7, 1100):
        return
    agree(sample(1100, 7, rows=2), options, tail, "logprobs", divergence=divergence, **OPTIONS[options])


@every_divergence
@pytest.mark.parametrize("gap", [25.0, 200.0])
def test_topk_a_tiny_rest_keeps_its_digits_on_triton(divergence, gap):
    """The student's mass outside the list is far below the rounding of 1."""
    arguments = sample(40, 3, rows=2, dtype=torch.float32)
    arguments["student"] = arguments["student"].scatter_add(-1, arguments["indices"], torch.full((2, 3), gap))
    options = {"divergence": divergence, "temperature": 1.7}
    (loss, gradient), (exact, truth) = (
        scalar(a, b, "bucket", "logprobs", **options)
        for a, b in ((arguments, "triton"), (in_float64(arguments), "reference"))
    )
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    if bool(loss.isfinite()):
        torch.testing.assert_close(gradient.double(), truth, rtol=2e-5, atol=1e-6 * float(truth.abs().max()))


def special_rows(kernels, tail, divergence):
    """-inf listed or not, on one side or both, everything listed, extreme logits, NaN, +inf."""
    inf, nan = torch.inf, torch.nan
    student = torch.tensor(
        [[1, 2, -inf, 0.5, 1], [1, -inf, 3, 0.5, 2], [1, 2, -inf, -inf, -inf], [900, 2, 3, 4, 1],
         [1e4, -1e4, 0, 5e3, 1], [1, nan, 2, 3, 0], [1, 2, nan, 3, 0], [inf, 2, 3, 1, 1], [-inf] * 5,
         [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])  # fmt: skip
    values = torch.tensor(
        [[-0.5, -1.5], [-0.7, -inf], [-0.7, -1.2], [-0.1, -3.0], [-0.3, -1.5], [-0.5, -1.5], [-0.5, -1.5],
         [-0.5, -1.5], [-0.5, -1.5], [nan, -1.5], [-0.5, inf]])  # fmt: skip
    indices, labels = torch.tensor([[0, 1]]).expand(11, 2), torch.zeros(11, dtype=torch.int64)
    found = []
    for backend, dtype in ((kernels, torch.float32), ("reference", torch.float64)):
        x = student.to(dtype).requires_grad_()
        teacher = mfd.TopK(values.to(dtype), indices, tail=tail)
        options = {"divergence": divergence, "temperature": 1.5, "reduction": "none", "backend": backend}
        loss = mfd.distill_loss(x, teacher, labels, **options)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    (loss, gradient), (exact, truth) = found[0], (t.float() for t in found[1])
    near = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(loss, exact, **near, equal_nan=True)
    finite = exact.isfinite()
    torch.testing.assert_close(gradient[finite], truth[finite], **near)


@every_divergence
@pytest.mark.parametrize("values_are", ["logprobs", "logits"])
def test_topk_terms_and_by_products_on_triton(divergence, values_are):
    arguments = sample(130, 20, rows=3)
    for tail in ("bucket", "renormalize", "zero"):
        if refused(divergence, tail, values_are, 20, 130):
            continue
        teacher = mfd.TopK(arguments["values"][values_are], arguments["indices"], tail=tail, values_are=values_are)
        call = {k: arguments[k] for k in ("student", "labels", "temperature", "teacher_temperature")}
        call |= {"teacher": teacher, "divergence": divergence}
        found = [mfd.distill_terms(**call, backend=b) for b in ("triton", "reference")]
        for name, a, b in zip(found[0]._fields, *found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


every_pair = pytest.mark.parametrize(
    ("tail", "divergence"),
    [(t, d) for t in ("bucket", "renormalize", "zero") for d in DIVERGENCES if not refused(d, t, "logprobs", 2, 5)],
    ids=str,
)


@every_pair
def test_topk_special_rows_on_triton(tail, divergence):
    special_rows("triton", tail, divergence)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
def test_topk_bad_lists_give_nan_where_nothing_checks_them_on_triton(monkeypatch, tail):
    monkeypatch.setattr(distill_loss, "check_indices", lambda *_: None)
    bad_lists("triton", tail)


def bad_lists(backend, tail):
    """As on a GPU: an index out of range, a class listed twice, and a label that is needed and not listed."""
    arguments = sample(9, 3, rows=5)
    arguments["labels"] = arguments["indices"][:, 0].clone()
    clean = scalar(arguments, backend, tail, "logprobs")
    indices = arguments["indices"].clone()
    indices[1, 1], indices[2, 2], indices[3, 1] = 9, -1, indices[3, 2]
    student = arguments["student"].clone().requires_grad_()
    teacher = mfd.TopK(arguments["values"]["logprobs"], indices, tail=tail)
    options = {"reduction": "none", "backend": backend}
    loss = mfd.distill_loss(student, teacher, arguments["labels"], **options)
    assert loss.isnan().tolist() == [False, True, True, True, False]
    gradient = torch.autograd.grad(loss.sum(), student)[0]
    assert bool(gradient[[0, 4]].isfinite().all())
    assert clean[0].isfinite()
    if tail != "zero":
        labels = arguments["labels"].clone()
        labels[4] = next(c for c in range(9) if c not in indices[4].tolist())
        loss = mfd.distill_loss(student, teacher, labels, divergence="dkd", **options)
        assert loss.isnan().tolist() == [False, True, True, True, True]
