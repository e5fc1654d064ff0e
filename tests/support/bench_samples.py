"""A hand-written result file: what the tables, pictures and the report must make of it is known."""

from __future__ import annotations

import copy
from typing import Any

from benchmarks.suites import distill, head
from mfd_fast.bench.workloads import Goals, Workload


def _times(median: float) -> dict[str, Any]:
    return {"median": median, "q1": 0.98 * median, "q3": 1.02 * median, "samples": [median] * 5}


def measured(name: str, title: str, median: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "title": title, "gate": "green", "red": None, "error": 1e-8, "eager_error": 1e-8, "charged": "",
        "first_call_seconds": None, "extra_bytes": 1 << 20, "launches": None, **_times(median), **more,
    }  # fmt: skip


def red(name: str, title: str, why: str) -> dict[str, Any]:
    return {
        "name": name, "title": title, "gate": "red", "red": why, "error": None, "eager_error": None, "charged": "",
        "first_call_seconds": None,
    }  # fmt: skip


def result(
    workload: Workload, *measurements: dict[str, Any], backend: str = "cpu", floor: float = 1.0
) -> dict[str, Any]:
    return {
        "workload": workload.as_json(), "bytes": 49_152_000, "flops": 0, "primary": f"mfd_fast:{backend}",
        "backend": backend, "not_run": {"cuda": "no kernels"}, "floor": _times(floor), "call": _times(0.02),
        "plain": None, "measurements": list(measurements), "left_out": {"trl": "trl is not installed"},
    }  # fmt: skip


def document() -> dict[str, Any]:
    """A fast op, an op that is slower than torch.compile, a red one; one workload left out, one rival missing."""
    fast = result(
        distill(4096, 1000, targets=Goals(floor=1.4, eager=9)),
        measured("mfd_fast:cpu", "mfd_fast (cpu)", 2.0),
        measured("eager", "eager PyTorch", 20.0),
        red("liger", "Liger", "its gradient is wrong"),
    )
    slow = result(
        head(256, 3, 512, 100, targets=Goals(eager=3)),
        measured("mfd_fast:reference", "mfd_fast (reference)", 6.0),
        measured("eager", "eager PyTorch", 9.0),
        measured("compile", "torch.compile", 3.0, first_call_seconds=4.0),
        backend="reference",
    )
    wrong = result(
        distill(64, 100), red("mfd_fast:cpu", "mfd_fast (cpu)", "a row is off"), measured("eager", "eager PyTorch", 1.0)
    )
    points = [
        {"size": 4 * 10**k, "backend": "cpu", "ms": 0.1 * 10**k, "floor_ms": 0.05 * 10**k, "extra_bytes": 10**k}
        for k in range(5)
    ]
    grown = {
        "op": "distill_loss", "axis": "rows", "letter": "N", "fixed": {"classes": 1000}, "backend": "cpu",
        "points": points, "time_exponent": 1.0, "floor_exponent": 1.0, "memory_exponent": 1.31,
    }  # fmt: skip
    return copy.deepcopy(
        {
            "schema": 1,
            "machine": {
                "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789", "cpu": "Some CPU (R) 9000", "cores": 2,
                "threads": 2, "clock_mhz": 2600.0, "last_level_cache_bytes": 1 << 25, "isa": "avx512",
                "load_average": 0.1, "environment": {}, "system": "Linux", "python": "3.11.7", "torch": "2.13.0",
                "triton": None, "mfd_fast": "0.1.0", "peers": {"liger-kernel": "0.8.5", "trl": None}, "device": "cpu",
                "neighbours": 0.25,
            },
            "ceilings": {
                "stream_gb_s": 40.0, "cached_stream_gb_s": 90.0, "copy_gb_s": 30.0, "gemm_gflop_s": 200.0,
                "call_us": 20.0,
            },
            "results": [fast, slow, wrong],
            "suite": "cpu", "flush": False, "seconds": 12.0,
            "left_out": [{"name": "distill_loss 9x9 float32", "reason": "out of memory"}],
            "missing": {"fla": "fla-core needs a GPU"},
            "growth": [grown],
        }
    )  # fmt: skip
