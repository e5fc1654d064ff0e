"""The launches of distill_loss that tests/test_triton_aot.py compiles: recorded from the wrapper itself."""

from __future__ import annotations

from typing import Any

import torch

from mfd_fast.backends.triton import distill_loss, launch, scale
from mfd_fast.contract import check_rows

CAPABILITIES = (80, 90, 100)
CLASSES = (100, 1000, 32000, 128256)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("distill_scalar", "distill_rows", "distill_rows_backward")

# Everything at C=1000 and C=32000; the other widths where they differ, which is in the shape of the tile.
NAMES = [f"distill_scalar-{c}-{d}-{cc}" for cc in CAPABILITIES for c in CLASSES for d in DTYPES]
NAMES += [f"distill_rows_backward-{c}-{d}-{cc}" for cc in CAPABILITIES for c in CLASSES for d in DTYPES]
EXTRA = [f"distill_rows-{c}-{d}-90" for c in (1000, 128256) for d in DTYPES]
EXTRA += [f"{kernel}-8192-{d}-90" for kernel in KERNELS for d in DTYPES]
EXTRA += ["count_rows-1000-fp32-80", "reduce_loss-1000-fp32-80", "scale_in_place-1000-bf16-80"]


Launch = tuple[Any, dict[str, Any], int, int]


def launches(name: str) -> Launch:
    """(kernel, arguments, capability, warps) of the launch called ``kernel-classes-dtype-capability``."""
    return _recorded(name, {})


def variants(name: str) -> list[Launch]:
    """The same launch with other numbers; all must use one compiled kernel."""
    changes = [{}, {"temperature": 7.5}, {"n": 17, "label_smoothing": 0.3}, {"n": 1, "ignore_index": 1}]
    return [_recorded(name, change) for change in changes]


def _recorded(name: str, changes: dict[str, Any]) -> Launch:
    wanted, classes, dtype, capability = name.split("-")
    found: dict[str, tuple[Any, dict[str, Any], int]] = {}

    def record(kernel: Any, programs: int, device: torch.device, warps: int, arguments: dict[str, Any]) -> None:
        found[kernel.__name__] = (kernel, arguments, warps)

    original = launch.launch
    distill_loss.launch = scale.launch = record
    try:
        _run_everything(int(classes), DTYPES[dtype], **changes)
    finally:
        distill_loss.launch = scale.launch = original
    kernel, arguments, warps = found[wanted]
    return kernel, arguments, int(capability), warps


def _run_everything(classes: int, dtype: torch.dtype, n: int = 2, **options: Any) -> None:
    """Both terms, labels, a mask and, in backward, every gradient: the launches that need most registers."""
    student = torch.zeros(n, classes, dtype=dtype)
    rows = check_rows(
        "aot",
        student,
        student.clone(),
        torch.zeros(n, dtype=torch.int64),
        mask=torch.ones(n, dtype=torch.bool),
        **{"temperature": 2.0, "label_smoothing": 0.1, **options},
    )
    weight = torch.ones(n)
    _, gradient = distill_loss.scalar(
        rows, weight=weight, soft_weight=1.0, hard_weight=0.5, mean=True, normalizer=None, needs_grad=True
    )
    stats = distill_loss.per_row(rows, terms=True)[2]
    distill_loss.per_row_backward(rows, stats, weight, weight, (True, True, True, True))
    distill_loss.scale_gradient_(gradient, weight[0])
