"""Any layout of inputs and of grad_output gives the same numbers as contiguous memory."""

import pytest
import torch
from harness import assert_same, evaluate, map_tensors, named_tensors, on, requiring_grad, upstream
from op_db import RECORDS, SAMPLE_CASES, crossed, samples_on

import mfd_fast as mfd
from mfd_fast.testing import LAYOUTS

ODD = [name for name in LAYOUTS if name != "contiguous"]
# A layout may change which vector width reads a row, and with it the order of a sum.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def laid_out(arguments, names, layout):
    """Both the argument in that layout and its contiguous copy (some layouts repeat values)."""
    sparse = [name for name, value in arguments.items() if isinstance(value, mfd.TopK)]
    if layout in ("expanded", "stride_zero") and sparse:
        # The indices differ within a row, and the label may have to be among them: neither can be repeated.
        names = tuple(name for name in names if name not in (*sparse, "labels"))
    odd = {k: map_tensors(v, LAYOUTS[layout]) if k in names else v for k, v in arguments.items()}
    return odd, map_tensors(odd, lambda t: t.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize(("record", "backend", "name", "layout"), crossed(SAMPLE_CASES, ODD))
def test_all_inputs_in_a_layout(record, backend, name, layout):
    sample = record.samples()[name]
    odd, plain = laid_out(sample, tuple(sample), layout)
    found, expected = (evaluate(record, on(record, backend), a) for a in (odd, plain))
    assert_same(found, expected, layout, **CLOSE)
    one = record.differentiable[:1]
    found, expected = (evaluate(record, on(record, backend), a, names=one) for a in (odd, plain))
    assert_same(found, expected, layout, **CLOSE)


@pytest.mark.parametrize("layout", ODD)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
def test_one_side_in_a_layout(backend, side, layout, dtype):
    record = RECORDS["distill_loss"]
    sample = record.samples(dtype=dtype, rows=8, classes=37)["leading"]
    odd, plain = laid_out(sample, (side,), layout)
    for names in (("student",), ("student", "teacher")):
        found, expected = (evaluate(record, on(record, backend), a, names=names) for a in (odd, plain))
        tolerance = CLOSE if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
        assert_same(found, expected, f"{side} {layout}", **tolerance)


@pytest.mark.parametrize(("record", "backend", "name", "layout"), crossed(SAMPLE_CASES, ODD))
def test_grad_output_in_a_layout(record, backend, name, layout):
    sample = record.samples()[name]

    def odd(output, seed):
        return LAYOUTS[layout](upstream(output, seed))

    def plain(output, seed):
        return odd(output, seed).clone(memory_format=torch.contiguous_format)

    found, expected = (evaluate(record, on(record, backend), sample, grad_outputs=g) for g in (odd, plain))
    assert_same(found, expected, f"{name} {layout}", **CLOSE)


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (1, 1, 1), (2, 1, 3), (3, 1), (2, 3, 2), (1, 2, 1, 3)],
    ids=str,
)
def test_leading_dimensions(backend, shape):
    """Any number of leading dimensions, none included, equals the flattened problem."""
    record = RECORDS["distill_loss"]
    count = torch.Size(shape).numel()
    flat = {**record.samples(rows=count, classes=5)["per_row"]}
    shaped = {
        k: v.reshape((*shape, *v.shape[1:])) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in flat.items()
    }
    found, expected = (evaluate(record, on(record, backend), a) for a in (shaped, flat))
    assert found.outputs["loss"].shape == shape
    for (name, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, **CLOSE, msg=name)


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
def test_overlapping_windows_and_flips(backend):
    """Rows that share memory, and views torch makes of negative-step indexing."""
    record = RECORDS["distill_loss"]
    buffer = torch.randn(40)
    student, teacher = buffer.as_strided((5, 7), (3, 1)), buffer.as_strided((5, 7), (1, 3), 2)
    plain = {"student": student.clone(), "teacher": teacher.clone()}
    found, expected = (
        evaluate(record, lambda **a: {"loss": record.op(**a, backend=backend)}, a, names=("student",))
        for a in ({"student": student, "teacher": teacher.flip(0).flip(0)}, plain)
    )
    assert_same(found, expected, "windows", **CLOSE)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_gradient_is_contiguous_and_of_the_students_form(backend):
    record = RECORDS["distill_loss"]
    for name in samples_on(record, backend):
        sample = record.samples(dtype=torch.bfloat16)[name]
        for names in (("student",), ("student", "teacher")):
            arguments = requiring_grad(sample, names)
            leaves = {k: t for k, t in named_tensors(arguments).items() if t.requires_grad}
            outputs = record.outputs(record.op(**arguments, backend=backend))
            loss = sum(v.sum() for v in outputs.values() if v.requires_grad)
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for (key, leaf), grad in zip(leaves.items(), grads, strict=True):
                if grad is not None:
                    assert grad.is_contiguous(), (name, key)
                    assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


def test_what_no_kernel_can_read_is_copied_once_a_call(monkeypatch):
    """Classes that are not the last dimension in memory, as in maps [N, C, H, W]."""
    wide, narrow = torch.randn(2, 7, 3, 5).unbind(0), torch.randn(4, 3, 5)
    x, y = (side.movedim(0, -1) for side in wide)  # [3, 5, 7]
    head = torch.randn(7, 4)
    modalities = [narrow.movedim(0, -1), narrow.movedim(0, -1) + 1]
    calls = {
        "distill_loss": (2, lambda: mfd.distill_loss(x, y, backend="cpu")),
        "feature_loss": (2, lambda: mfd.feature_loss(x, y, backend="cpu")),
        "modal_pool": (2, lambda: mfd.modal_pool(modalities, scores=torch.zeros(3, 5, 2), backend="cpu")),
        # The teacher's logits stand in for the student's, which are still to be computed.
        "mfd_loss": (4, lambda: mfd.mfd_loss(modalities, torch.zeros(4), head, None, y, backend="cpu")),
    }
    copies = []
    real = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: (t.is_contiguous() or copies.append(t.shape), real(t))[1])
    for name, (most, call) in calls.items():
        for _ in range(3):
            copies.clear()
            call()
            assert len(copies) <= most, name
