"""Gradients by finite differences in float64, retain_graph and scaling."""

import pytest
import torch
from harness import assert_same, evaluate, map_tensors, named_tensors, on, requiring_grad
from op_db import CASE_IDS, CASES, KERNEL_CASES, RECORDS, SAMPLE_CASES, SAMPLE_IDS, crossed

from mfd_fast.testing import assert_bitwise_equal


def tiny(record, name, **options):
    return record.samples(dtype=torch.float64, rows=4, classes=3, **options)[name]


def function_of_leaves(record, backend, arguments, names=None):
    """The op as a function of its differentiable tensors alone, for gradcheck."""
    arguments = requiring_grad(arguments, record.differentiable if names is None else names)
    leaves = {k: v for k, v in named_tensors(arguments).items() if v.requires_grad}

    def call(*values):
        replaced = dict(zip(map(id, leaves.values()), values, strict=True))
        swapped = map_tensors(arguments, lambda t: replaced.get(id(t), t))
        outputs = record.outputs(on(record, backend)(**swapped))
        return tuple(v for v in outputs.values() if v.requires_grad)

    return call, tuple(leaves.values())


# Interpreted kernels are slow: instead of finite differences, the derivatives of the reference.
CHECKED = {i: case for case, i in zip(SAMPLE_CASES, SAMPLE_IDS, strict=True) if case[1] != "triton"}
INTERPRETED = {f"{r.name}-{name}": (r, name) for r, backend, name in SAMPLE_CASES if backend == "triton"}
STUDENT_ALONE = [case for case in KERNEL_CASES if case[0] != "triton"]


@pytest.mark.parametrize(("record", "backend", "name"), CHECKED.values(), ids=CHECKED)
def test_gradcheck(record, backend, name):
    call, leaves = function_of_leaves(record, backend, tiny(record, name))
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize(("backend", "name"), STUDENT_ALONE)
def test_gradcheck_of_the_student_alone(backend, name):
    record = RECORDS["distill_loss"]
    call, leaves = function_of_leaves(record, backend, tiny(record, name), ("student",))
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("wrt", ["first", "all"])
@pytest.mark.parametrize(("record", "name"), INTERPRETED.values(), ids=INTERPRETED)
def test_float64_gradients_are_those_of_the_reference(record, name, wrt):
    names = record.differentiable[:1] if wrt == "first" else record.differentiable
    found, expected = (
        evaluate(record, on(record, b), tiny(record, name), names=names) for b in ("triton", "reference")
    )
    assert any(bool(grad.any()) for grad in expected.grads.values())
    assert_same(found, expected, name, rtol=1e-9, atol=1e-11)


def backward_of(record, backend, name, names, dtype=torch.float32):
    rows = {"rows": 4} if backend == "triton" else {}  # interpreting is slow
    arguments = requiring_grad(record.samples(dtype=dtype, **rows)[name], names)
    leaves = [v for v in named_tensors(arguments).values() if v.requires_grad]
    outputs = record.outputs(on(record, backend)(**arguments))
    ends = [v for v in outputs.values() if v.requires_grad]
    return leaves, ends


WRT = {"first": lambda r: r.differentiable[:1], "all": lambda r: r.differentiable}


@pytest.mark.parametrize(("record", "backend", "name", "wrt"), crossed(SAMPLE_CASES, WRT))
def test_backward_twice_gives_the_same_gradient_twice(record, backend, name, wrt):
    leaves, ends = backward_of(record, backend, name, WRT[wrt](record))
    ups = [torch.full_like(end, 0.5) for end in ends]
    first, second, third = (
        torch.autograd.grad(ends, leaves, ups, retain_graph=True, allow_unused=True, materialize_grads=True)
        for _ in range(3)
    )
    kept = [g.clone() for g in first]
    for a, b, c, d in zip(first, second, third, kept, strict=True):
        assert_bitwise_equal(b, a)
        assert_bitwise_equal(c, a)
        assert_bitwise_equal(a, d)  # nobody wrote into a gradient that was handed out


@pytest.mark.parametrize(("record", "backend", "name", "wrt"), crossed(SAMPLE_CASES, WRT))
def test_four_times_the_loss_has_four_times_the_gradient(record, backend, name, wrt):
    """A power of two scales exactly; three times the loss, to rounding."""
    leaves, ends = backward_of(record, backend, name, WRT[wrt](record))
    one, four, three = (
        torch.autograd.grad(
            ends,
            leaves,
            [torch.full_like(end, factor) for end in ends],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for factor in (1.0, 4.0, 3.0)
    )
    # Gradients that cancel keep the rounding of the terms: that of the largest gradient.
    scale = max(1.0, *(float(g.abs().max()) for g in one if g.numel()))
    for a, b, c in zip(one, four, three, strict=True):
        assert_bitwise_equal(4 * a, b)
        torch.testing.assert_close(3 * a, c, rtol=1e-5, atol=4e-6 * scale)


@pytest.mark.parametrize(("record", "backend"), CASES, ids=CASE_IDS)
def test_gradients_accumulate_over_two_losses(record, backend):
    name = next(iter(record.samples()))
    leaves, ends = backward_of(record, backend, name, record.differentiable)
    for scale in (1.0, 2.0):
        torch.autograd.backward(ends, [torch.full_like(e, scale) for e in ends], retain_graph=True)
    accumulated = [leaf.grad for leaf in leaves]
    expected = torch.autograd.grad(ends, leaves, [torch.full_like(e, 3.0) for e in ends])
    for a, b in zip(accumulated, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_input_changed_in_place_before_backward_is_refused_or_harmless(backend, reduction):
    record = RECORDS["distill_loss"]
    arguments = {**record.samples()["plain"], "reduction": reduction}
    expected = evaluate(record, on(record, backend), arguments, names=("student",))
    leaf = arguments["student"].clone().requires_grad_()
    student = leaf * 1.0
    loss = record.op(**{**arguments, "student": student}, backend=backend)
    with torch.no_grad():
        student.add_(1.0)
    up = torch.randn(loss.shape, generator=torch.Generator().manual_seed(sum(b"loss"))).half().bfloat16().float()
    try:
        (grad,) = torch.autograd.grad(loss, leaf, up)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert_bitwise_equal(grad, expected.grads["student"])


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
def test_no_graph_where_nothing_requires_grad(backend):
    record = RECORDS["distill_loss"]
    sample = record.samples()["labels"]
    assert not record.op(**sample, backend=backend).requires_grad
    sample["student"].requires_grad_()
    with torch.no_grad():
        assert not record.op(**sample, backend=backend).requires_grad
    with torch.inference_mode():
        quiet = record.op(**sample, backend=backend)
    assert_bitwise_equal(quiet.clone(), record.op(**sample, backend=backend).detach())


@pytest.mark.parametrize("backend", RECORDS["distill_terms"].backends)
@pytest.mark.parametrize("term", ["soft", "hard"])
def test_one_term_alone_backpropagates(backend, term):
    """grad_output of the other term is None; the by-products carry no graph."""
    record = RECORDS["distill_terms"]
    sample = record.samples(dtype=torch.float64)["per_row"]
    grads = {}
    for where in (backend, "reference"):
        arguments = requiring_grad(sample, record.differentiable)
        out = record.op(**arguments, backend=where)
        assert [f for f, v in out._asdict().items() if v.requires_grad] == ["soft", "hard"]
        leaves = [arguments[k] for k in record.differentiable if k in arguments]
        value = getattr(out, term).sum()
        grads[where] = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(grads[backend], grads["reference"], strict=True):
        torch.testing.assert_close(a, b)
