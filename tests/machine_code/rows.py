"""What one more row costs a group of threads: the row kernels, counted."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mfd_fast
from mfd_fast.backends import cuda

from .counting import BYTES_PER_CLOCK, bound, counts, digest, in_column_loops, per_element
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
    #: None: every block counts the rows.
    normalizer: float | None = None

    @property
    def name(self) -> str:
        parts = [self.divergence, str(self.classes), self.dtype, *(["labels"] if self.labels else [])]
        return " ".join(parts)

    @property
    def needs_labels(self) -> bool:
        return self.labels or self.divergence in ("dkd", "nkd")

    @property
    def columns(self) -> int:
        """Of a row; what counts are divided by."""
        return self.classes

    @property
    def bytes_per_column(self) -> int:
        """Two reads and a write."""
        return 3 * DTYPES[self.dtype].itemsize

    def fields(self) -> dict[str, Any]:
        """Of a record, which they identify."""
        return {
            "op": "distill_loss",
            "divergence": self.divergence,
            "labels": self.labels,
            "shape": [self.classes],
            "dtype": self.dtype,
        }

    def call(self, n_rows: int) -> Any:
        """(loss, student, teacher, labels)."""
        torch.manual_seed(0)
        dtype = DTYPES[self.dtype]
        student, teacher = ((torch.randn(n_rows, self.classes) * 2).to(dtype) for _ in range(2))
        labels = torch.randint(0, self.classes, (n_rows,)) if self.needs_labels else None
        student.requires_grad_()
        loss = mfd_fast.distill_loss(
            student,
            teacher,
            labels,
            divergence=mfd_fast.AlphaBeta(0.5, 0.25) if self.divergence == "alpha_beta" else self.divergence,
            temperature=2.0,
            hard_weight=0.5 if self.labels else 0.0,
            normalizer=self.normalizer,
            backend="cuda",
        )
        return loss, student, teacher, labels


def sources() -> dict[str, Path]:
    return {part: ROOT / "csrc" / "cuda" / name for part, name in SOURCES.items()}


def run(case: RowCase, n_rows: int, processors: int, clusters: set[int] | None) -> tuple[list[Launch], Any]:
    """The launches of one call, and what the call returns."""
    module = cuda.native()
    module.set_device(90, processors, 232448)
    recorder = Recorder(module, sources(), clusters, case.kernels)
    try:
        with recorder.recording():
            result = case.call(n_rows)
    finally:
        module.set_device(90, 4, 232448)
    return recorder.launches, result


def _launch(case: RowCase, launches: list[Launch]) -> Launch:
    return next(launch for launch in launches if any(name in launch.kernel.name for name in case.kernels))


def _groups_in_block(launch: Launch) -> int:
    """Rows that a block handles at a time."""
    by_warp = "lean_warp|4Warp|pool_|match_taps" if launch.threads == 128 else "lean_warp|4Warp"
    return launch.threads // 32 if re.search(by_warp, launch.kernel.name) else 1


def probed(case: RowCase) -> Launch:
    """A launch of many rows on one multiprocessor, or on as many as a cluster has blocks; nothing is executed."""
    many = 256 if case.columns <= 1024 else 32
    launch = _launch(case, run(case, many, 1, set())[0])
    return launch if launch.cluster == 1 else _launch(case, run(case, many, launch.cluster, set())[0])


def facts(case: RowCase, launch: Launch) -> dict[str, Any]:
    """What a record says of the launch. Equal facts mean equal counts."""
    return {
        "backend": "cuda",
        "kernel": next(name for name in case.kernels if name in launch.kernel.name),
        "code": digest(launch.kernel),
        "registers": launch.kernel.registers,
        "shared_bytes": launch.shared_bytes,
        "threads": launch.threads,
        "cluster": launch.cluster,
        "resident_blocks": launch.resident_blocks,
        "grid_blocks": launch.grid // launch.cluster,
    }


def measure(case: RowCase) -> dict[str, Any]:
    """A record of counts.json: two more rows of every group of one multiprocessor (or one cluster).

    What counting all rows costs each block is no part of it.
    """
    case = replace(case, normalizer=1.0)
    probe = probed(case)
    cluster, in_block = probe.cluster, _groups_in_block(probe)
    groups = probe.grid // cluster * in_block
    few, many = (_launch(case, run(case, groups * rows, cluster, {0})[0]) for rows in (1, 3))
    difference = Counter(counts(many.kernel, many.traces[0]))
    difference.subtract(counts(few.kernel, few.traces[0]))
    elements = 2 * in_block * case.columns
    resident = min(few.resident_blocks, groups // in_block)
    times = [simulate(launch.kernel, launch.warps(), resident).clocks for launch in (few, many)]
    ideal = case.bytes_per_column / BYTES_PER_CLOCK * elements / cluster * resident
    fraction, binding = bound(difference, elements, case.bytes_per_column)
    by_class = per_element(difference, elements)
    return {
        **facts(case, probe),
        **case.fields(),
        "instructions_per_pair": by_class.pop("total"),
        "by_class": by_class,
        "bound": round(fraction, 3),
        "bound_by": binding,
        "simulated": round(ideal / (times[1] - times[0]), 3),
        **in_column_loops(many.kernel, many.traces[0], 2 * many.threads * cluster // 32, elements, few.traces[0]),
    }
