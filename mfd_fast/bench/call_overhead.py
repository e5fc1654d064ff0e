"""What a call costs beside its kernel: ``python -m mfd_fast.bench.call_overhead``.

A step is a forward and its backward to all leaves. It is measured against an empty node of autograd with the same
leaves, which allocates a loss and the gradients and does nothing else: the least that any op costs in PyTorch. All are
called in turns in one process, and the least time of each counts, so that a busy machine changes the ratios little.

``cpu``: the step as it is, and the same step with one row, whose kernel is next to nothing: that is the overhead.
``cuda`` and ``triton``: with launches that do nothing, on a CPU. The look-up of a GPU's stream has no part in it; the
multiplication by the gradient of the loss, which a GPU's backward launches, has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mfd_fast as mfd

from . import stubbed_triton
from .timing import Step

BACKENDS = ("cpu", "cuda", "triton")
#: Overheads above these multiples of an empty node are a regression: of a CPU what was measured, and 30 % for other
#: machines; of a GPU the targets.
LIMITS = {
    "cpu": {"distill_loss": 1.75, "modal_pool": 1.8, "feature_loss": 2.1, "12 taps": 2.1, "mfd_loss": 2.4},
    "cuda": {"distill_loss": 1.6, "modal_pool": 2.0, "feature_loss": 2.5, "12 taps": 2.5, "mfd_loss": 3.0},
}
LIMITS["triton"] = LIMITS["cuda"]


@dataclass(frozen=True)
class Overhead:
    """Microseconds; ``overhead_us`` of a step without its kernel. ``op``: a key of ``LIMITS``."""

    op: str
    backend: str
    shape: str
    empty_us: float
    step_us: float
    overhead_us: float

    @property
    def ratio(self) -> float:
        """Of the overhead to an empty node."""
        return self.overhead_us / self.empty_us


class _Empty(torch.autograd.Function):
    """A loss that is nothing, with gradients that nobody has written."""

    @staticmethod
    def forward(ctx: Any, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return leaves[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(leaf) for leaf in ctx.saved_tensors)


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _distill_loss(rows: int, backend: str) -> tuple[list[Tensor], Step]:
    student, teacher = _leaf(rows, 100), torch.randn(rows, 100)
    return [student], lambda: mfd.distill_loss(student, teacher, temperature=4.0, backend=backend).backward()


def _modal_pool(rows: int, backend: str) -> tuple[list[Tensor], Step]:
    features, query, upstream = [_leaf(rows, 512) for _ in range(2)], _leaf(512), torch.randn(rows, 512)
    return [*features, query], lambda: mfd.modal_pool(features, query, backend=backend).pooled.backward(upstream)


def _feature_loss(rows: int, backend: str, taps: int = 4) -> tuple[list[Tensor], Step]:
    students, teachers = [_leaf(rows, 256) for _ in range(taps)], [torch.randn(rows, 256) for _ in range(taps)]
    return students, lambda: mfd.feature_loss(students, teachers, backend=backend).backward()


def _mfd_loss(rows: int, backend: str) -> tuple[list[Tensor], Step]:
    features, leaves = [_leaf(rows, 512) for _ in range(2)], (_leaf(512), _leaf(31, 512), _leaf(31))
    teacher, labels = torch.randn(rows, 31), torch.randint(0, 31, (rows,))

    def step() -> None:
        arguments = (features, *leaves, teacher, labels)
        mfd.mfd_loss(*arguments, temperature=2.0, hard_weight=0.5, backend=backend).loss.backward()

    return [*features, *leaves], step


def _twelve_taps(rows: int, backend: str) -> tuple[list[Tensor], Step]:
    return _feature_loss(rows, backend, 12)


_CALLS = {
    "distill_loss": ("64x100", 64, _distill_loss),
    "modal_pool": ("128x2x512", 128, _modal_pool),
    "feature_loss": ("4 taps 64x256", 64, _feature_loss),
    "12 taps": ("64x256", 64, _twelve_taps),
    "mfd_loss": ("64x2x512x31", 64, _mfd_loss),
}


def _fresh(leaves: Sequence[Tensor], step: Step) -> Step:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        step()

    return run


def _least(steps: Sequence[Step], rounds: int) -> list[float]:
    """Microseconds of each, called in turns."""
    best = [float("inf")] * len(steps)
    for _ in range(rounds):
        for k, step in enumerate(steps):
            start = time.perf_counter_ns()
            step()
            best[k] = min(best[k], (time.perf_counter_ns() - start) / 1e3)
    return best


def measure(op: str, backend: str = "cpu", rounds: int = 2000) -> Overhead:
    """One op in this process. ``cuda`` and ``triton`` need the environment of :func:`stubbed`."""
    shape, rows, make = _CALLS[op]
    leaves, step = make(rows, backend)
    few, short = make(1, backend)
    empty = _fresh(leaves, lambda: _Empty.apply(*leaves).backward())
    empty_us, step_us, short_us = _least([empty, _fresh(leaves, step), _fresh(few, short)], rounds)
    return Overhead(op, backend, shape, empty_us, step_us, short_us if backend == "cpu" else step_us)


def stubbed(backend: str) -> dict[str, str]:
    """The environment of a process in which ``backend`` runs on CPU tensors."""
    if backend == "cuda":
        return {"MFD_FAST_CUDA_EMULATOR": str(Path(__file__).with_name("stubbed_cuda.py"))}
    return {}


def measure_all(backend: str, rounds: int) -> list[Overhead]:
    """Every op, in a process of its own."""
    command = [sys.executable, "-m", "mfd_fast.bench.call_overhead", "--here", backend, "--rounds", str(rounds)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | stubbed(backend)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{backend}: {done.stderr.strip().splitlines()[-1]}")
    return [Overhead(**fields) for fields in json.loads(done.stdout)]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where an overhead is above its limit."""
    parser = argparse.ArgumentParser(prog="python -m mfd_fast.bench.call_overhead", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--rounds", type=int, default=2000, help="calls of each step, in turns")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--here", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.here:
        torch.set_num_threads(1)
        if arguments.here == "triton":
            stubbed_triton.install()
        print(json.dumps([asdict(measure(op, arguments.here, arguments.rounds)) for op in _CALLS]))
        return 0
    found = [each for backend in arguments.backend or BACKENDS for each in measure_all(backend, arguments.rounds)]
    print(f"{'op':14}{'shape':16}{'backend':9}{'empty µs':>9}{'step µs':>9}{'overhead':>10}{'limit':>7}")
    slow = False
    for each in found:
        limit = LIMITS[each.backend][each.op]
        slow |= each.ratio > limit
        row = f"{each.op:14}{each.shape:16}{each.backend:9}{each.empty_us:9.1f}{each.step_us:9.1f}{each.ratio:9.2f}x"
        print(f"{row}{limit:7.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) | {"ratio": each.ratio} for each in found], indent=1) + "\n")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
