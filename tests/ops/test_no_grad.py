"""Under no_grad nothing is computed or kept for a backward, whatever the leaves say."""

import pytest
import torch
from harness import named_tensors, on, requiring_grad
from op_db import CASES, samples_on

from mfd_fast.backends import allocate, plans

KERNELS = [(record, backend) for record, backend in CASES if backend != "reference"]


@pytest.mark.parametrize(("record", "backend"), KERNELS, ids=lambda part: getattr(part, "name", part))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("calls", [1, 2], ids=["checked", "planned"])
def test_leaves_that_require_grad_cost_nothing_under_no_grad(record, backend, calls, mode):
    arguments = record.samples()[samples_on(record, backend)[0]]
    leaves = requiring_grad(arguments, record.differentiable)
    assert any(t.requires_grad for t in named_tensors(leaves).values())
    made: list[list[torch.Size]] = []
    values = []
    for given in (arguments, leaves):
        plans.forget()
        for _ in range(calls):  # the second one by a plan, where the first has left one
            shapes: list[torch.Size] = []
            former = allocate.set_hook(lambda t, shapes=shapes: shapes.append(t.shape) or t)
            try:
                with mode():
                    outputs = record.outputs(on(record, backend)(**given))
            finally:
                allocate.set_hook(former)
        values.append(outputs)
        made.append(shapes)
    assert made[0] == made[1]
    for name, value in values[0].items():
        assert torch.equal(value, values[1][name]), name
        assert not values[1][name].requires_grad
