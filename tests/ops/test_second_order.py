"""Second-order gradients are right on every backend: never silently wrong."""

import pytest
import torch
from harness import named_tensors, on, requiring_grad, upstream
from op_db import RECORDS
from test_gradients import CHECKED, INTERPRETED, STUDENT_ALONE, function_of_leaves, tiny


@pytest.mark.parametrize(("record", "backend", "name"), CHECKED.values(), ids=CHECKED)
def test_gradgradcheck(record, backend, name):
    call, leaves = function_of_leaves(record, backend, tiny(record, name))
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(("backend", "name"), STUDENT_ALONE)
def test_gradgradcheck_of_the_student_alone(backend, name):
    record = RECORDS["distill_loss"]
    call, leaves = function_of_leaves(record, backend, tiny(record, name), ("student",))
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("wrt", ["first", "all"])
@pytest.mark.parametrize(("record", "name"), INTERPRETED.values(), ids=INTERPRETED)
def test_second_derivatives_are_those_of_the_reference(record, name, wrt):
    names = record.differentiable[:1] if wrt == "first" else record.differentiable
    unused = {"allow_unused": True, "materialize_grads": True}
    found = {}
    for where in ("triton", "reference"):
        arguments = requiring_grad(tiny(record, name), names)
        leaves = [leaf for leaf in named_tensors(arguments).values() if leaf.requires_grad]
        outputs = record.outputs(on(record, where)(**arguments))
        ends = {k: end for k, end in outputs.items() if end.requires_grad}
        ups = [upstream(end, sum(k.encode())) for k, end in ends.items()]
        grads = torch.autograd.grad(list(ends.values()), leaves, ups, create_graph=True, **unused)
        curved = {i: grad for i, grad in enumerate(grads) if grad.requires_grad}
        again = [upstream(grad, i) for i, grad in curved.items()]
        found[where] = torch.autograd.grad(list(curved.values()), leaves, again, **unused)
    for a, b in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
@pytest.mark.parametrize("names", [("student",), ("student", "teacher")], ids=["scalar", "recompute"])
def test_hessian_is_that_of_the_reference(backend, names):
    record = RECORDS["distill_loss"]
    arguments = tiny(record, "labels")
    hessians = {}
    for where in (backend, "reference"):
        call, leaves = function_of_leaves(record, where, arguments, names)
        (loss,) = call(*leaves)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        size = sum(g.square().sum() for g in grads)
        hessians[where] = torch.autograd.grad(size, leaves)
    for a, b in zip(hessians[backend], hessians["reference"], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
def test_first_order_gradient_with_create_graph_is_the_same(backend):
    record = RECORDS["distill_loss"]
    for names in (("student",), record.differentiable):
        call, leaves = function_of_leaves(record, backend, tiny(record, "shared_temperature"), names)
        plain = torch.autograd.grad(call(*leaves), leaves)
        graph = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
        assert all(g.requires_grad for g in graph)
        for a, b in zip(graph, plain, strict=True):
            torch.testing.assert_close(a.detach(), b)
