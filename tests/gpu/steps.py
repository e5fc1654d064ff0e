"""What the GPU's own tests share: ops on tensors of the device, forward and backward as one step, capture of steps.

In a rehearsal a stream is nothing and a graph computes again at each replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import on_device
import torch
from harness import Arguments, OpRecord, Result, map_tensors, named_tensors, requiring_grad, upstream
from on_device import DEVICE, ON_GPU
from op_db import RECORDS
from torch import Tensor
from variants import variants_on

BACKENDS = ("cuda", "triton")
#: (record, backend, sample) of every class of kernels that runs on a GPU.
CASES = [
    (record, backend, name)
    for record in RECORDS.values()
    for backend in BACKENDS
    if backend in record.backends
    for name in variants_on(record, backend)
]
IDS = [f"{record.name}-{backend}-{name}" for record, backend, name in CASES]
#: (record, backend), with the first sample.
OPS = [(record, backend) for record in RECORDS.values() for backend in BACKENDS if backend in record.backends]
OP_IDS = [f"{record.name}-{backend}" for record, backend in OPS]


def placed(arguments: Arguments) -> Arguments:
    return map_tensors(arguments, lambda t: t.to(DEVICE, copy=True))


def step_of(
    record: OpRecord,
    backend: str | None,
    arguments: Arguments,
    names: tuple[str, ...] | None = None,
    call: Callable[..., Any] | None = None,
) -> Callable[[], Result]:
    """Outputs and gradients of ``arguments``, which lie on the device; each call computes them from what these hold."""
    op = on_device.here(record.op) if call is None else call
    arguments = requiring_grad(arguments, record.differentiable if names is None else names)
    leaves = {k: t for k, t in named_tensors(arguments).items() if t.requires_grad}
    seeds: dict[str, Tensor] = {}

    def step() -> Result:
        outputs = record.outputs(op(**arguments, **({} if backend is None else {"backend": backend})))
        ends = {k: v for k, v in outputs.items() if v.requires_grad}
        for k, end in ends.items():
            if k not in seeds:
                seeds[k] = upstream(end.detach().cpu(), sum(k.encode())).to(DEVICE)
        grads: tuple[Tensor, ...] = ()
        if ends and leaves:
            ups = [seeds[k] for k in ends]
            grads = torch.autograd.grad(
                list(ends.values()), list(leaves.values()), ups, allow_unused=True, materialize_grads=True
            )
        return Result({k: v.detach() for k, v in outputs.items()}, dict(zip(leaves, grads, strict=False)))

    return step


def fill(arguments: Arguments, others: Arguments) -> None:
    """Writes the values of ``others`` into the tensors of ``arguments``."""
    theirs = named_tensors(others)
    for name, t in named_tensors(arguments).items():
        t.detach().copy_(theirs[name])


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A stream of its own, on which everything begins late; waited for at the end."""
    if not ON_GPU:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        yield
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """PyTorch raises where something waits for the device."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Captured:
    """A step as a CUDA graph: ``result`` holds what the last ``replay`` has computed."""

    def __init__(self, step: Callable[[], Result]) -> None:
        self.step = step
        if not ON_GPU:
            self.result = step()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and loaded before
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step()

    def replay(self) -> Result:
        if ON_GPU:
            self.graph.replay()
        else:
            self.result = self.step()
        return self.result
