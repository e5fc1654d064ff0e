"""The parts of `make gpu`: in the order of their worth, each with seconds, an item's patience and its processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import staging

#: Folders and files without tests of a backend on a device; `tests/gpu` and the emulator have their own.
NOT_HERE = (
    *("gpu", "cuda_emulator", "backends/cpu", "backends/cuda", "backends/test_backends*", "integration/test_compile*"),
    *("integrations", "machine_code", "packaging", "tools"),
)


@dataclass(frozen=True)
class Part:
    """``shares``: what each process takes, as BACKEND:I/N; in a rehearsal one process takes it all, or one a backend.

    ``tests``: what pytest collects; () for a part of worker.py.
    """

    name: str
    seconds: float
    patience: float
    shares: tuple[str, ...]
    rehearsal: tuple[str, ...]
    tests: Callable[[bool], Sequence[str | Path]] | None = None


def split(backend: str, count: int) -> tuple[str, ...]:
    return tuple(f"{backend}:{index}/{count}" for index in range(count))


def battery_tests(rehearsal: bool) -> list[str | Path]:
    tests = staging.ROOT / "tests"
    if rehearsal:  # collecting all takes longer than the rest
        return [tests / "ops" / "test_values.py", tests / "numerics" / "test_special_fusion.py"]
    return [tests, *(f"--ignore-glob={tests / name}" for name in NOT_HERE)]


def gpu_tests(_: bool) -> list[str | Path]:
    return [staging.ROOT / "tests" / "gpu"]


PARTS = (
    Part("facts", 45, 40, split("all", 1), split("all", 1)),
    Part("smoke", 60, 20, split("cuda", 2) + split("triton", 6), split("cuda", 1)),
    Part("speed", 60, 30, split("all", 1), split("all", 1)),
    Part("compare", 120, 60, split("all", 1), split("all", 1)),
    Part("battery", 120, 20, split("cuda", 3) + split("triton", 5), split("cuda", 1), battery_tests),
    Part("streams", 60, 20, split("cuda", 1) + split("triton", 1), split("cuda", 1), gpu_tests),
    Part("sanitizer", 45, 60, split("all", 2), split("all", 1)),
)
#: Tests of a part of pytest in a rehearsal.
FEW = 3


def command(part: Part, share: str, device: str, until: float, journal: Path) -> list[str]:
    """Of the process that takes ``share``."""
    common = [f"--until={until}", f"--journal={journal}"]
    if part.tests is None:
        worker = staging.ROOT / "tests" / "gpu" / "worker.py"
        return [sys.executable, str(worker), part.name, f"--device={device}", f"--share={share}", *common]
    backend, fraction = share.split(":")
    return [
        *(sys.executable, "-m", "pytest", "-q", "-p", "battery", "-p", "no:cacheprovider"),
        *("-W", "default", "--continue-on-collection-errors", "--tb=short", "-o", f"pythonpath={staging.SITE}"),
        *(f"--rootdir={staging.ROOT}", f"--part={part.name}", f"--of-backend={backend}", f"--share={fraction}"),
        *common,
        *([f"--first={FEW}"] if device == "cpu" else []),
        *map(str, part.tests(device == "cpu")),
    ]
