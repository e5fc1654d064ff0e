"""The launches of feature_loss that test_triton_aot_fusion.py compiles: recorded from the wrapper itself."""

from __future__ import annotations

from typing import Any

import torch
from aot_distill_loss import each
from aot_recorder import Launch, recorded

from mfd_fast.backends.triton import feature_loss
from mfd_fast.problems.features import check_feature_loss

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = [
    "match_taps-mse-bf16-80",
    "match_taps-cosine-bf16-90",
    "match_taps-cosine-fp32-90",
    "match_taps-smooth_l1-bf16-100",
]
EACH = each(NAMES)


def launches(name: str) -> Launch:
    """(kernel, arguments, capability, warps, options) of the launch called ``kernel-kind-dtype-capability``."""
    kernel, kind, dtype, capability = name.split("-")
    return recorded(kernel, int(capability), lambda: _run(kind, dtype))


def variants(name: str) -> list[Launch]:
    """The same launch with other numbers; all must use one compiled kernel."""
    kernel, kind, dtype, capability = name.split("-")
    changes: list[dict[str, Any]] = [{}, {"weight": [1.0, 0.3]}, {"n": 17}, {"n": 1}, {"skipped": 1}]
    return [recorded(kernel, int(capability), lambda c=c: _run(kind, dtype, **c)) for c in changes]


def _run(kind: str, dtype_name: str, n: int = 2, weight: Any = 0.5, skipped: int = 0) -> None:
    """Two taps, one held and one streamed, with a mask and both gradients."""
    dtype = DTYPES[dtype_name]
    students = [torch.zeros(n, width, dtype=dtype) for width in (1024, 16384)]
    mask = [torch.ones(n + skipped, dtype=torch.bool)[skipped:]] * 2
    problem = check_feature_loss("aot", students, [s.clone() for s in students], kind=kind, mask=mask, weight=weight)
    feature_loss.scalar(problem, [True, True])
