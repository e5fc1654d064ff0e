"""Second-order gradients are right on every backend: never silently wrong."""

import pytest
import torch
from op_db import KERNEL_CASES, RECORDS, SAMPLE_CASES, SAMPLE_IDS
from test_gradients import function_of_leaves, tiny


@pytest.mark.parametrize(("record", "backend", "name"), SAMPLE_CASES, ids=SAMPLE_IDS)
def test_gradgradcheck(record, backend, name):
    call, leaves = function_of_leaves(record, backend, tiny(record, name))
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(("backend", "name"), KERNEL_CASES)
def test_gradgradcheck_of_the_student_alone(backend, name):
    record = RECORDS["distill_loss"]
    call, leaves = function_of_leaves(record, backend, tiny(record, name), ("student",))
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


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
