"""The calls that counts.json has figures of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import mfd_fast

from .rows import DTYPES, RowCase


@dataclass(frozen=True)
class TopKCase(RowCase):
    """``distill_loss`` of a teacher of which 64 classes are listed: a read and a write of the student."""

    kernels: tuple[str, ...] = ("topk_rows",)

    @property
    def name(self) -> str:
        return f"topk {super().name}"

    @property
    def bytes_per_column(self) -> int:
        return 2 * DTYPES[self.dtype].itemsize

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "op": "topk"}

    def call(self, n_rows: int) -> Any:
        torch.manual_seed(0)
        student = (torch.randn(n_rows, self.classes) * 2).to(DTYPES[self.dtype]).requires_grad_()
        columns = torch.stack([torch.randperm(self.classes)[:64] for _ in range(n_rows)])
        values = (torch.randn(n_rows, 64) * 2).to(DTYPES[self.dtype])
        labels = torch.randint(0, self.classes, (n_rows,)) if self.labels else None
        teacher = mfd_fast.TopK(values.log_softmax(-1) - 0.1, columns, tail="bucket")
        hard = 0.5 if self.labels else 0.0
        loss = mfd_fast.distill_loss(
            student,
            teacher,
            labels,
            divergence=self.divergence,
            temperature=2.0,
            hard_weight=hard,
            normalizer=self.normalizer,
            backend="cuda",
        )
        return loss, student, teacher, labels


@dataclass(frozen=True)
class PoolCase(RowCase):
    """``modal_pool`` of four modalities of ``classes`` columns: its forward or its backward pass."""

    kernels: tuple[str, ...] = ("pool_forward",)

    @property
    def name(self) -> str:
        return f"{self.kernels[-1]} {self.classes} {self.dtype}"

    @property
    def bytes_per_column(self) -> int:
        return (5 if "pool_forward" in self.kernels else 9) * DTYPES[self.dtype].itemsize

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "op": self.kernels[-1], "divergence": None, "shape": [4, self.classes]}

    def call(self, n_rows: int) -> Any:
        torch.manual_seed(0)
        dtype = DTYPES[self.dtype]
        features = [torch.randn(n_rows, self.classes).to(dtype).requires_grad_() for _ in range(4)]
        query = torch.randn(self.classes).to(dtype).requires_grad_()
        pooled, weights = mfd_fast.modal_pool(features, query, backend="cuda")
        if "pool_backward" in self.kernels:
            torch.autograd.grad(pooled, [*features, query], torch.ones_like(pooled))
        return pooled, weights


@dataclass(frozen=True)
class FeatureCase(RowCase):
    """``feature_loss`` of one tap of ``classes`` columns with the student's gradient; ``divergence`` is its kind."""

    kernels: tuple[str, ...] = ("match_taps",)

    @property
    def name(self) -> str:
        return f"feature_loss {self.divergence} {self.classes} {self.dtype}"

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "op": "feature_loss"}

    def call(self, n_rows: int) -> Any:
        torch.manual_seed(0)
        student, teacher = (torch.randn(n_rows, self.classes).to(DTYPES[self.dtype]) for _ in range(2))
        student.requires_grad_()
        return mfd_fast.feature_loss(student, teacher, kind=self.divergence, backend="cuda")


ROW_CASES = [
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
CASES: list[RowCase] = [
    *ROW_CASES,
    *(TopKCase(classes, dtype) for classes in (1000, 32000, 128256) for dtype in ("bfloat16",)),
    TopKCase(32000, "float32"),
    TopKCase(32000, "bfloat16", True),
    *(
        PoolCase(1024, dtype, kernels=(kernel,))
        for kernel in ("pool_forward", "pool_backward")
        for dtype in ("bfloat16", "float32")
    ),
    *(
        FeatureCase(1024, dtype, divergence=kind)
        for kind in ("mse", "smooth_l1", "cosine")
        for dtype in ("bfloat16", "float32")
    ),
]
