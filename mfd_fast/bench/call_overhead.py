"""What a call costs beside its kernel: ``python -m mfd_fast.bench.call_overhead``.

A step is a forward and its backward to all leaves. It is measured against an empty node of autograd with the same
leaves, which allocates a loss and the gradients and does nothing else: the least that any op costs in PyTorch. All are
called in turns in one process, and the least time of each counts, so that a busy machine changes the ratios little.

``cpu``: the step as it is, and the same step with one row, whose kernel is next to nothing: that is the overhead.
``--cuts`` says where a step on ``cpu`` spends its time, by differences of such times.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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


@dataclass(frozen=True)
class TimedStep:
    """``forward`` gives what ``backward`` starts from, with the gradient ``upstream``."""

    leaves: list[Tensor]
    forward: Callable[[], Tensor]
    upstream: Tensor | None = None

    def step(self) -> None:
        self.forward().backward(self.upstream)

    def without_gradients(self) -> None:
        with torch.no_grad():
            self.forward()


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _distill_loss(rows: int, backend: str) -> TimedStep:
    student, teacher = _leaf(rows, 100), torch.randn(rows, 100)
    return TimedStep([student], lambda: mfd.distill_loss(student, teacher, temperature=4.0, backend=backend))


def _modal_pool(rows: int, backend: str) -> TimedStep:
    features, query, upstream = [_leaf(rows, 512) for _ in range(2)], _leaf(512), torch.randn(rows, 512)
    return TimedStep([*features, query], lambda: mfd.modal_pool(features, query, backend=backend).pooled, upstream)


def _feature_loss(rows: int, backend: str, taps: int = 4) -> TimedStep:
    students, teachers = [_leaf(rows, 256) for _ in range(taps)], [torch.randn(rows, 256) for _ in range(taps)]
    return TimedStep(students, lambda: mfd.feature_loss(students, teachers, backend=backend))


def _mfd_loss(rows: int, backend: str) -> TimedStep:
    features, leaves = [_leaf(rows, 512) for _ in range(2)], (_leaf(512), _leaf(31, 512), _leaf(31))
    teacher, labels = torch.randn(rows, 31), torch.randint(0, 31, (rows,))

    def forward() -> Tensor:
        arguments = (features, *leaves, teacher, labels)
        return mfd.mfd_loss(*arguments, temperature=2.0, hard_weight=0.5, backend=backend).loss

    return TimedStep([*features, *leaves], forward)


_CALLS: dict[str, tuple[str, int, Callable[..., TimedStep]]] = {
    "distill_loss": ("64x100", 64, _distill_loss),
    "modal_pool": ("128x2x512", 128, _modal_pool),
    "feature_loss": ("4 taps 64x256", 64, _feature_loss),
    "12 taps": ("64x256", 64, partial(_feature_loss, taps=12)),
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
    call, short = make(rows, backend), make(1, backend)
    steps = [_empty(call), _fresh(call.leaves, call.step), _fresh(short.leaves, short.step)]
    empty_us, step_us, short_us = _least(steps, rounds)
    return Overhead(op, backend, shape, empty_us, step_us, short_us if backend == "cpu" else step_us)


@dataclass(frozen=True)
class Cuts:
    """Where a step on "cpu" spends its time, in microseconds; the parts add up to ``step_us``.

    ``function_us``: the public function without gradients: arguments, plan, outputs, and the kernel of one row.
    ``node_us``: what gradients add to that: their memory, the node of autograd and what it saves. ``backward_us``: the
    engine and the node's backward. Each of one row; ``forward_kernel_us`` and ``backward_kernel_us`` are what all rows
    add, in a loss's forward its gradients too. ``empty_us``: an empty node, beside them.
    """

    op: str
    shape: str
    empty_us: float
    step_us: float
    function_us: float
    node_us: float
    backward_us: float
    forward_kernel_us: float
    backward_kernel_us: float


def cuts(op: str, rounds: int = 2000) -> Cuts:
    """Of one op in this process."""
    shape, rows, make = _CALLS[op]
    call, short = make(rows, "cpu"), make(1, "cpu")
    steps = [_empty(call), _fresh(call.leaves, call.step), call.forward]
    steps += [_fresh(short.leaves, short.step), short.forward, short.without_gradients]
    empty, step, forward, short_step, short_forward, bare = _least(steps, rounds)
    backward = short_step - short_forward
    parts = bare, short_forward - bare, backward, forward - short_forward, step - forward - backward
    return Cuts(op, shape, empty, step, *parts)


def _empty(call: TimedStep) -> Step:
    return _fresh(call.leaves, lambda: _Empty.apply(*call.leaves).backward())


def stubbed(backend: str) -> dict[str, str]:
    """The environment of a process in which ``backend`` runs on CPU tensors."""
    if backend == "cuda":
        return {"MFD_FAST_CUDA_EMULATOR": str(Path(__file__).with_name("stubbed_cuda.py"))}
    return {}


def measure_all(backend: str, rounds: int, threads: int = 1) -> list[Overhead]:
    """Every op, in a process of its own."""
    return [Overhead(**fields) for fields in _elsewhere(backend, rounds, threads)]


def _elsewhere(backend: str, rounds: int, threads: int, *more: str) -> list[dict[str, Any]]:
    module = [sys.executable, "-m", "mfd_fast.bench.call_overhead"]
    command = [*module, "--here", backend, "--rounds", str(rounds), "--threads", str(threads), *more]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | stubbed(backend)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{backend}: {done.stderr.strip().splitlines()[-1]}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where an overhead is above its limit."""
    parser = argparse.ArgumentParser(prog="python -m mfd_fast.bench.call_overhead", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--rounds", type=int, default=2000, help="calls of each step, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and of the kernels")
    parser.add_argument("--cuts", action="store_true", help="where each step on cpu spends its time")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--here", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.here:
        torch.set_num_threads(arguments.threads)
        if arguments.here == "triton":
            stubbed_triton.install()
        of = cuts if arguments.cuts else partial(measure, backend=arguments.here)
        print(json.dumps([asdict(of(op, rounds=arguments.rounds)) for op in _CALLS]))
        return 0
    if arguments.cuts:
        return _show_cuts(arguments)
    backends = arguments.backend or BACKENDS
    found = [each for name in backends for each in measure_all(name, arguments.rounds, arguments.threads)]
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


def _show_cuts(arguments: argparse.Namespace) -> int:
    found = _elsewhere("cpu", arguments.rounds, arguments.threads, "--cuts")
    names = [name for name in found[0] if name.endswith("_us")]
    titles = [name.removesuffix("_us").replace("_kernel", " k.") for name in names]
    print(f"{'op':14}{'shape':16}" + "".join(f"{title:>12}" for title in titles) + "  µs")
    for each in found:
        print(f"{each['op']:14}{each['shape']:16}" + "".join(f"{each[name]:12.1f}" for name in names))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
