"""Tensors on a device that is not the current one: the launch goes there, and the current device stays."""

import pytest
import torch
from harness import evaluate, map_tensors
from on_device import here
from steps import CASES, IDS


@pytest.mark.parametrize(("record", "backend", "name"), CASES, ids=IDS)
def test_the_tensors_device_is_the_one_that_runs(record, backend, name):
    def on(device):
        arguments = map_tensors(record.samples()[name], lambda t: t.to(device))
        return evaluate(
            record,
            lambda **a: here(record.op)(**a, backend=backend),
            arguments,
            grad_outputs=lambda output, seed: torch.full_like(output, 0.5),
        )

    first, second = on("cuda:0"), on("cuda:1")
    assert torch.cuda.current_device() == 0
    for (key, a), (_, b) in zip(first.items(), second.items(), strict=True):
        assert b.device == torch.device("cuda:1"), key
        torch.testing.assert_close(a, b.to("cuda:0"), rtol=1e-6, atol=1e-7, msg=key)
