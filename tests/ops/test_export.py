"""torch.export of every op: one program for any number of rows, with the values of the eager call."""

import pytest
import torch
from plan_calls import random, tensors_in
from torch import nn

import mfd_fast as mfd

PLACES = torch.tensor([[0, 1, 2]]).expand(6, 3).contiguous()


class Called(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *arguments):
        return tensors_in(self.call(*arguments))


#: The call, its tensors with a dimension of rows, and those without.
CALLS = {
    "distill_loss": (mfd.distill_loss, [(6, 7), (6, 7)], []),
    "distill_loss of a list": (lambda s, v, i: mfd.distill_loss(s, mfd.TopK(v, i, values_are="logits")), [(6, 7)], []),
    "distill_terms": (mfd.distill_terms, [(6, 7), (6, 7)], []),
    "feature_loss": (mfd.feature_loss, [(6, 4), (6, 4)], []),
    "modal_pool": (lambda a, b, q: mfd.modal_pool([a, b], q), [(6, 4), (6, 4)], [(4,)]),
    "mfd_loss": (lambda a, t, q, w: mfd.mfd_loss([a, a + 1], q, w, None, t), [(6, 4), (6, 7)], [(4,), (7, 4)]),
    "linear_distill_loss": (
        lambda a, b, w, v: mfd.linear_distill_loss(a, w, b, v),
        [(6, 4), (6, 3)],
        [(7, 4), (7, 3)],
    ),
}


@pytest.mark.rest
@pytest.mark.parametrize("name", CALLS)
def test_an_exported_op_takes_any_number_of_rows(name):
    call, of_rows, others = CALLS[name]
    rows = [random(*shape, seed=k) for k, shape in enumerate(of_rows)]
    rows += [random(6, 3, seed=8), PLACES] if "list" in name else []
    shared = [random(*shape, seed=20 + k) for k, shape in enumerate(others)]
    n = torch.export.Dim("n", min=2, max=64)
    shapes = (*({0: n} for _ in rows), *(None for _ in shared))
    module = Called(call)
    exported = torch.export.export(module, (*rows, *shared), dynamic_shapes=(shapes,), strict=False).module()
    for count in (6, 7):
        given = [*(torch.cat((t, t[:1]))[:count] for t in rows), *shared]
        torch.testing.assert_close(exported(*given), module(*given))
