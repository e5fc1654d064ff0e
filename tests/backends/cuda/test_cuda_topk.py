"""TopK teachers on the CUDA kernels against the reference in float64: tails, sizes, options, rungs, bad lists."""

import pytest
import torch
from test_cpu_divergences import assert_agree
from test_cpu_topk import every_kind, in_float64, per_row, refused, sample, scalar
from test_cuda_rungs import A100, H100, emulate  # noqa: F401
from test_triton_topk import OPTIONS, bad_lists, every_divergence, every_pair, special_rows

import mfd_fast as mfd
from mfd_fast.backends.cuda import distill_loss
from mfd_fast.problems.rows import check_rows

TAILS = ("bucket", "renormalize", "zero")
# Small shared memory makes short rows long ones: (device, classes) and the rung.
RUNGS = {
    "warp": (H100, 130),
    "block": (H100, 1100),
    "cluster": ((90, 4, 8192), 2300),
    "stream": ((80, 4, 8192), 2300),
    "bits in device memory": ((80, 4, 5300), 9000),
}


def plan(arguments):
    student = arguments["student"]
    teacher = mfd.TopK(arguments["values"]["logprobs"], arguments["indices"])
    return distill_loss.plan(check_rows("distill_loss", student, teacher, None))[0]


def agree(arguments, context, tail, values_are, **options):
    for call in (per_row, scalar):
        pair = [call(arguments, b, tail, values_are, **options) for b in ("cuda", "reference")]
        assert_agree(*pair, f"{context} {call.__name__}")


@every_divergence
@every_kind
def test_topk_float64_on_cuda(divergence, tail, values_are):
    """All classes listed, one, some of a row of several vectors per thread."""
    for classes, width in ((1, 1), (9, 9), (9, 1), (300, 17)):
        if not refused(divergence, tail, values_are, width, classes):
            arguments = sample(classes, width, rows=3)
            agree(arguments, f"C={classes} K={width}", tail, values_are, divergence=divergence)


@pytest.mark.parametrize(
    "divergence", [mfd.ForwardKL(), mfd.AlphaBeta(0.6, 0.3), mfd.DKD(0.7, 2.0), mfd.NKD(0.8)], ids=str
)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("options", OPTIONS)
def test_topk_float64_options_on_cuda(divergence, tail, options):
    if not refused(divergence, tail, "logprobs", 7, 300):
        agree(sample(300, 7, rows=2), options, tail, "logprobs", divergence=divergence, **OPTIONS[options])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("tail", TAILS)
def test_every_rung(emulate, rung, tail, dtype):  # noqa: F811
    device, classes = RUNGS[rung]
    emulate(*device)
    for divergence in (mfd.JSD(0.3), mfd.AlphaBeta(0.6, 0.3), mfd.NKD(0.8)):
        if refused(divergence, tail, "logprobs", 37, classes):
            continue
        arguments = sample(classes, 37, rows=2, dtype=dtype)
        arguments["labels"][:] = arguments["indices"][:, 0]
        assert plan(arguments) == rung.replace("bits in device memory", "stream")
        options = {"divergence": divergence, "hard_weight": 0.5, "label_smoothing": 0.1}
        for call in (per_row, scalar):
            found = call(arguments, "cuda", tail, "logprobs", **options)
            exact = call(in_float64(arguments), "reference", tail, "logprobs", **options)
            for a, b in zip(found, exact, strict=True):
                near = {"rtol": 2e-4, "atol": 2e-6} if a.dtype != torch.bfloat16 else {"rtol": 8e-3, "atol": 1e-5}
                torch.testing.assert_close(a.double(), b, **near, msg=lambda m, d=divergence: f"{rung} {d}: {m}")


@every_divergence
@pytest.mark.parametrize("gap", [25.0, 200.0])
def test_topk_a_tiny_rest_keeps_its_digits_on_cuda(divergence, gap):
    """The student's mass outside the list is far below the rounding of 1."""
    arguments = sample(40, 3, rows=2, dtype=torch.float32)
    arguments["student"] = arguments["student"].scatter_add(-1, arguments["indices"], torch.full((2, 3), gap))
    options = {"divergence": divergence, "temperature": 1.7}
    (loss, gradient), (exact, truth) = (
        scalar(a, b, "bucket", "logprobs", **options)
        for a, b in ((arguments, "cuda"), (in_float64(arguments), "reference"))
    )
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    if bool(loss.isfinite()):
        torch.testing.assert_close(gradient.double(), truth, rtol=2e-5, atol=1e-6 * float(truth.abs().max()))


@every_divergence
@pytest.mark.parametrize("values_are", ["logprobs", "logits"])
def test_topk_terms_and_by_products_on_cuda(divergence, values_are):
    arguments = sample(130, 20, rows=3)
    for tail in TAILS:
        if refused(divergence, tail, values_are, 20, 130):
            continue
        teacher = mfd.TopK(arguments["values"][values_are], arguments["indices"], tail=tail, values_are=values_are)
        call = {k: arguments[k] for k in ("student", "labels", "temperature", "teacher_temperature")}
        call |= {"teacher": teacher, "divergence": divergence}
        found = [mfd.distill_terms(**call, backend=b) for b in ("cuda", "reference")]
        for name, a, b in zip(found[0]._fields, *found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@every_pair
def test_topk_special_rows_on_cuda(tail, divergence):
    special_rows("cuda", tail, divergence)


@pytest.mark.parametrize("tail", TAILS)
def test_topk_bad_lists_give_nan_where_nothing_checks_them_on_cuda(monkeypatch, tail):
    monkeypatch.setattr(distill_loss, "check_indices", lambda *_: None)
    bad_lists("cuda", tail)


def test_a_bad_list_leaves_no_gradient_unwritten(monkeypatch):
    monkeypatch.setattr(distill_loss, "check_indices", lambda *_: None)
    student = torch.randn(3, 9, requires_grad=True)
    values = torch.full((3, 2), -1.0, requires_grad=True)
    indices = torch.tensor([[0, 1], [3, 9], [4, 4]])
    loss = mfd.distill_loss(student, mfd.TopK(values, indices), reduction="none", backend="cuda")
    of_student, of_values = torch.autograd.grad(loss.sum(), [student, values])
    assert of_values.isnan().all(-1).tolist() == [False, True, True]
    assert of_student.isnan().any(-1).tolist() == [False, True, True]
