"""What the machine can do at best, measured in the process that measures the ops.

- stream: two arrays read, one written into memory that already exists, as a loss reads student and teacher and writes
  the gradient (on a CPU with the native module's streaming add, else ``torch.add(out=)``);
- copy: ``Tensor.copy_``; gemm: the fastest product at hand, in the given dtype; call: forward and backward of an
  autograd function that does nothing.

The floor of a workload is its bytes at the stream's rate plus its GEMMs, as a step that runs in turn with the
implementations, so that both see the same machine in the same second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops import Work
from .timing import Step, interleaved

MEBIBYTE = 1 << 20


def _native() -> Any:
    from ..backends import cpu

    return cpu.native() if cpu.available() is None else None


def stream_step(nbytes: int, device: torch.device) -> Step:
    """Moves ``nbytes`` in all: two thirds read, one third written to a buffer that is used again."""
    count = max(nbytes // 12, 1)
    a, b, out = (torch.ones(count, device=device) for _ in range(3))
    if device.type == "cuda":
        a.normal_(), b.normal_()
    native = _native() if device.type == "cpu" else None
    if native is None:
        return functools.partial(torch.add, a, b, out=out)
    threads = torch.get_num_threads()

    def step() -> tuple[Tensor, ...]:
        native.stream_add(a.data_ptr(), b.data_ptr(), out.data_ptr(), count, threads)
        return a, b, out

    return step


def gemm_step(m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, exact: bool = False) -> Step:
    """The product by whichever is faster here: ``torch.mm`` or the library that the cpu backend prefers to it.

    ``exact``: see :class:`Work`.
    """
    # Random numbers: a GPU multiplies constants faster.
    left, right = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
    steps: dict[str, Step] = {
        "mm": functools.partial(torch.mm, left, right, out=torch.empty(m, n, dtype=dtype, device=device))
    }
    if device.type == "cpu":
        from ..backends.cpu import gemm

        steps["linear"] = functools.partial(gemm.linear, left, right.T.contiguous(), exact=exact)
    times = interleaved(steps, device, 0.0, least=3)
    return steps[min(steps, key=lambda name: min(times[name].samples))]


def floor_step(work: Work, dtype: torch.dtype, device: torch.device) -> Step:
    """The stream and the GEMMs of ``work``, and nothing else."""
    steps = [stream_step(work.nbytes, device)] if work.nbytes else []
    steps += [gemm_step(*shape, dtype, device, work.exact) for shape in work.products]
    if len(steps) == 1:
        return steps[0]

    def step() -> None:
        for part in steps:
            part()

    return step


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # noqa: ARG004
        return grad_output


def call_step(device: torch.device) -> Step:
    x = torch.ones((), device=device, requires_grad=True)

    def step() -> None:
        _Nothing.apply(x).backward()
        x.grad = None

    return step


def measure(
    device: torch.device, dtype: torch.dtype | None = None, seconds: float = 2.0, *, scale: int = 1
) -> dict[str, Any]:
    """``stream_gb_s``, ``cached_stream_gb_s`` (6 MiB in all), ``copy_gb_s``, ``gemm_gflop_s``, ``call_us``.

    The GEMM is in ``dtype`` (``gemm_dtype``), by default that of tensor cores on a GPU: bfloat16. ``scale`` divides
    the sizes (rehearsals).
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    large, small = (768 * MEBIBYTE, 6 * MEBIBYTE) if device.type == "cpu" else (6144 * MEBIBYTE, 24 * MEBIBYTE)
    large, size = large // scale, (1024 if device.type == "cpu" else 8192) // scale
    source = torch.ones(large // 8, device=device)
    if device.type == "cuda":
        source.normal_()
    target = torch.empty_like(source)
    copy: Callable[[], object] = functools.partial(target.copy_, source)
    steps: dict[str, Step] = {
        "stream": stream_step(large, device),
        "cached": stream_step(small, device),
        "copy": copy,
        "gemm": gemm_step(size, size, size, dtype, device),
        "call": call_step(device),
    }
    medians = {name: times.median for name, times in interleaved(steps, device, seconds).items()}
    return {
        "stream_gb_s": large / medians["stream"] / 1e6,
        "cached_stream_gb_s": small / medians["cached"] / 1e6,
        "copy_gb_s": large / medians["copy"] / 1e6,
        "gemm_gflop_s": 2 * size**3 / medians["gemm"] / 1e6,
        "gemm_dtype": str(dtype).removeprefix("torch."),
        "call_us": 1e3 * medians["call"],
    }
