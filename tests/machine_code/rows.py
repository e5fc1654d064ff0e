"""What one more row costs a group of threads: the row kernels, counted."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mfd_fast
from mfd_fast.backends import cuda

from .counting import BYTES_PER_CLOCK, bound, counts, per_element
from .launches import ROOT, Launch, Recorder
from .timing import simulate

#: Kernels, by a pattern of their name, and where they are compiled.
SOURCES = {
    "mixture_forward": "distill/mixture_forward.cu",
    "mixture_backward": "distill/mixture_backward.cu",
    "distill_backward": "distill/backward.cu",
    "topk_rows": "topk/topk.cu",
    "match_taps": "fusion/feature_loss.cu",
    "scale_all": "fusion/feature_loss.cu",
    "mfd_single_pass": "fusion/mfd_loss.cu",
    "pool_": "fusion/modal_pool.cu",
    r"lean_\w+DivergenceE0E": "distill/lean_forward_kl.cu",
    r"lean_\w+DivergenceE[15]E": "distill/lean_pointwise.cu",
    r"lean_\w+DivergenceE[78]E": "distill/lean_target.cu",
    r"lean_\w+DivergenceE": "distill/lean_of_mean.cu",
    "distill_forward": "distill/forward.cu",
    "count_rows": "distill/forward.cu",
    "scale_in_place": "distill/forward.cu",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
H200_PROCESSORS = 132


@dataclass(frozen=True)
class RowCase:
    """A call of ``distill_loss``: rows of ``classes`` logits, loss and gradient."""

    classes: int
    dtype: str = "bfloat16"
    labels: bool = False
    divergence: str = "forward_kl"
    kernels: tuple[str, ...] = ("lean", "distill_forward")

    @property
    def name(self) -> str:
        parts = [self.divergence, str(self.classes), self.dtype, *(["labels"] if self.labels else [])]
        return " ".join(parts)

    @property
    def needs_labels(self) -> bool:
        return self.labels or self.divergence in ("dkd", "nkd")


def sources() -> dict[str, Path]:
    return {part: ROOT / "csrc" / "cuda" / name for part, name in SOURCES.items()}


def run(case: RowCase, n_rows: int, processors: int, clusters: set[int] | None) -> tuple[list[Launch], Any]:
    """The launches of one call, and (loss, gradient, student, teacher, labels)."""
    module = cuda.native()
    module.set_device(90, processors, 232448)
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    student, teacher = ((torch.randn(n_rows, case.classes) * 2).to(dtype) for _ in range(2))
    labels = torch.randint(0, case.classes, (n_rows,)) if case.needs_labels else None
    student.requires_grad_()
    recorder = Recorder(module, sources(), clusters)
    try:
        with recorder.recording():
            loss = mfd_fast.distill_loss(
                student,
                teacher,
                labels,
                divergence=case.divergence,
                temperature=2.0,
                hard_weight=0.5 if case.labels else 0.0,
                backend="cuda",
            )
    finally:
        module.set_device(90, 4, 232448)
    return recorder.launches, (loss, student, teacher, labels)


def _launch(case: RowCase, launches: list[Launch]) -> Launch:
    return next(launch for launch in launches if any(name in launch.kernel.name for name in case.kernels))


def _groups_in_block(launch: Launch) -> int:
    """Rows that a block handles at a time."""
    return launch.threads // 32 if re.search("lean_warp|4Warp", launch.kernel.name) else 1


def measure(case: RowCase) -> dict[str, Any]:
    """A record of counts.json: two more rows of every group of one multiprocessor (or one cluster)."""
    probe = _launch(case, run(case, 256 if case.classes <= 1024 else 32, 1, set())[0])
    cluster, in_block = probe.cluster, _groups_in_block(probe)
    if cluster > 1:
        probe = _launch(case, run(case, 32, cluster, set())[0])
    groups = probe.grid // cluster * in_block
    few, many = (_launch(case, run(case, groups * rows, cluster, {0})[0]) for rows in (1, 3))
    difference = Counter(counts(many.kernel, many.traces[0]))
    difference.subtract(counts(few.kernel, few.traces[0]))
    elements = 2 * in_block * case.classes
    dram_bytes = 3 * DTYPES[case.dtype].itemsize
    resident = min(few.resident_blocks, groups // in_block)
    times = [simulate(launch.kernel, launch.warps(), resident).clocks for launch in (few, many)]
    ideal = dram_bytes / BYTES_PER_CLOCK * elements / cluster * resident
    fraction, binding = bound(difference, elements, dram_bytes)
    by_class = per_element(difference, elements)
    total = by_class.pop("total")
    return {
        "backend": "cuda",
        "kernel": next(name for name in case.kernels if name in many.kernel.name),
        "divergence": case.divergence,
        "labels": case.labels,
        "shape": [case.classes],
        "dtype": case.dtype,
        "instructions_per_pair": total,
        "by_class": by_class,
        "registers": many.kernel.registers,
        "shared_bytes": many.shared_bytes,
        "threads": many.threads,
        "cluster": cluster,
        "resident_blocks": many.resident_blocks,
        "grid_blocks": probe.grid // cluster,
        "bound": round(fraction, 3),
        "bound_by": binding,
        "simulated": round(ideal / (times[1] - times[0]), 3),
    }


CASES = [
    *(RowCase(classes, "bfloat16", labels) for classes in (112, 1000, 8192, 32000, 128256) for labels in (False, True)),
    *(RowCase(classes, "float32", labels) for classes in (1000, 32000) for labels in (False, True)),
    RowCase(128256, "float32"),
    RowCase(1000, "float16"),
    RowCase(50257),
    *(
        RowCase(classes, labels=labels, divergence=name)
        for name in ("reverse_kl", "tvd", "jsd", "skew_kl")
        for classes, labels in ((1000, False), (32000, True), (128256, False))
    ),
    *(RowCase(32000, "float32", divergence=name) for name in ("reverse_kl", "tvd")),
    *(
        RowCase(32000, divergence=name)
        for name in ("reverse_kl", "tvd", "jsd", "skew_kl", "skew_reverse_kl", "alpha_beta", "dkd", "nkd")
    ),
]
