"""The launches of mfd_loss that test_triton_aot_fusion.py compiles: recorded from the wrapper itself."""

from __future__ import annotations

from typing import Any

import torch
from aot_distill_loss import DIVERGENCES, each
from aot_recorder import Launch, recorded

from mfd_fast.backends.protocol import MFDNeeds
from mfd_fast.backends.triton import mfd_loss, scale
from mfd_fast.problems.mfd import check_mfd_loss

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPE = "3x768x1000"
NAMES = [f"mfd_single_pass-{SHAPE}-bf16-{cc}" for cc in (80, 90, 100)]
NAMES += [f"mfd_single_pass-{SHAPE}-fp32-90", f"scale_all_in_place-{SHAPE}-bf16-90"]
# Forward KL is what a name without a divergence has.
OTHERS = {d: f"mfd_single_pass-{SHAPE}-bf16-90-{d}" for d in DIVERGENCES if d != "forward"}
EACH = each(NAMES)
COMPLETE = [*NAMES, *OTHERS.values()]
NAMES += [OTHERS["alphabeta"], OTHERS["dkd"]]


def launches(name: str) -> Launch:
    """(kernel, arguments, capability, warps, options) of ``kernel-MxDxC-dtype-capability[-divergence]``."""
    kernel, shape, dtype, capability, *divergence = name.split("-")
    options = DIVERGENCES[divergence[0]] if divergence else {}
    return recorded(kernel, int(capability), lambda: _run(shape, dtype, **options))


def variants(name: str) -> list[Launch]:
    """The same launch with other numbers; all must use one compiled kernel."""
    kernel, shape, dtype, capability = name.split("-")
    changes: list[dict[str, Any]] = [
        {},
        {"temperature": 7.5, "soft_weight": 0.1},
        {"n": 17, "label_smoothing": 0.3},
        {"n": 1},
        {"skipped": 1},
    ]
    return [recorded(kernel, int(capability), lambda c=c: _run(shape, dtype, **c)) for c in changes]


def _run(shape: str, dtype_name: str, n: int = 2, **options: Any) -> None:
    """Every term, mask and gradient: the launch that needs most registers."""
    count, width, classes = map(int, shape.split("x"))
    dtype = DTYPES[dtype_name]

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    skipped = options.pop("skipped", 0)
    given = {
        "teacher_features": zeros(n, width),
        "present": torch.ones(n, count, dtype=torch.bool),
        "bias": zeros(count),
        "pool_temperature": 0.5,
        "pool_scale": None,
        "temperature": 2.0,
        "soft_weight": 1.0,
        "hard_weight": 0.5,
        "feature_weight": 0.1,
        "feature_kind": "cosine",
        "teacher_pool_weights": torch.zeros(n, count),
        "pool_weight": 0.2,
        "absent_pool_weights": "infinite",
        "mask": torch.ones(n + skipped, dtype=torch.bool)[skipped:],
        "weight": torch.ones(n + skipped)[skipped:],
        "label_smoothing": 0.1,
        "reduction": "mean",
        "normalizer": None,
        **options,
    }
    labels = torch.zeros(n + skipped, dtype=torch.int64)[skipped:]
    problem = check_mfd_loss(
        "aot",
        [zeros(n, width) for _ in range(count)],
        zeros(width),
        zeros(classes, width),
        zeros(classes),
        zeros(n, classes),
        labels,
        **given,
    )
    (loss, *_), gradients = mfd_loss.scalar(problem, MFDNeeds(True, True, True, True, [True] * count))
    scale.scale_gradients_([*gradients[:4], *gradients.features], loss)
