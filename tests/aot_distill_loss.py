"""The launches of distill_loss that tests/test_triton_aot.py compiles: recorded from the wrapper itself."""

from __future__ import annotations

from typing import Any

import torch

import mfd_fast as mfd
from mfd_fast.backends.triton import distill_loss, launch, scale, teachers
from mfd_fast.contract import check_rows

CAPABILITIES = (80, 90, 100)
CLASSES = (100, 1000, 32000, 128256)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("distill_scalar", "distill_rows", "distill_rows_backward")
STANDARDIZE = mfd.LogitTransform(standardize=True)
#: What a name ends in: options of the launch. The first is the plain call.
OPTIONS: dict[str, dict[str, Any]] = {
    "forward": {"divergence": mfd.ForwardKL()},
    "reverse": {"divergence": mfd.ReverseKL()},
    "jsd": {"divergence": mfd.JSD(0.3)},
    "skew": {"divergence": mfd.SkewKL()},
    "skewreverse": {"divergence": mfd.SkewReverseKL()},
    "tvd": {"divergence": mfd.TVD()},
    "alphabeta": {"divergence": mfd.AlphaBeta(0.5, 0.25)},
    "dkd": {"divergence": mfd.DKD()},
    "nkd": {"divergence": mfd.NKD()},
    "teachers": {"teachers": 3},
    "standardized": {"student_transform": STANDARDIZE, "teacher_transform": STANDARDIZE},
}
#: The same with other numbers, which must not compile anything new.
OTHER_NUMBERS: dict[str, dict[str, Any]] = {
    "jsd": {"divergence": mfd.JSD(0.9)},
    "alphabeta": {"divergence": mfd.AlphaBeta(2.0, -1.0)},
    "dkd": {"divergence": mfd.DKD(2.0, 0.0)},
    "nkd": {"divergence": mfd.NKD(0.0)},
}

# sm_90: every option at every length in the scalar kernel, in the others at a length each; the other capabilities:
# every option once. Tiles of C=8192 are those of C=32000.
NAMES = [f"distill_scalar-{c}-{d}-90-{o}" for o in OPTIONS for c in CLASSES[1:] for d in DTYPES]
NAMES += [f"distill_scalar-100-{d}-{cc}-forward" for d in DTYPES for cc in CAPABILITIES]
for _o in OPTIONS:
    NAMES += [f"distill_rows_backward-1000-bf16-90-{_o}", f"distill_rows_backward-128256-fp32-90-{_o}"]
    NAMES += [f"distill_rows-1000-fp32-90-{_o}", f"distill_rows-32000-bf16-90-{_o}"]
    NAMES += [f"distill_scalar-1000-fp32-80-{_o}", f"distill_scalar-128256-bf16-100-{_o}"]
NAMES += [
    f"distill_rows_backward-{c}-{d}-{cc}-forward"
    for c, d, cc in (
        (100, "bf16", 80),
        (1000, "fp32", 100),
        (32000, "fp32", 90),
        (32000, "bf16", 80),
        (128256, "bf16", 100),
    )
]
NAMES += [f"distill_rows-128256-{d}-90-forward" for d in DTYPES]
NAMES += [f"mixture_backward-{c}-{d}-90-teachers" for c, d in ((1000, "fp32"), (32000, "bf16"), (128256, "fp32"))]
NAMES += ["count_rows-1000-fp32-80-forward", "reduce_loss-1000-fp32-80-forward", "scale_in_place-1000-bf16-80-forward"]


Launch = tuple[Any, dict[str, Any], int, int]


def launches(name: str) -> Launch:
    """(kernel, arguments, capability, warps) of the launch called ``kernel-classes-dtype-capability-option``."""
    return _recorded(name, {})[-1]


def launched(name: str) -> list[str]:
    """The kernels of a call of the scalar loss, its gradient included."""
    return [kernel.__name__ for kernel, *_ in _recorded(name, {}, scalar_only=True)]


def variants(name: str) -> list[Launch]:
    """The same launch with other numbers; all must use one compiled kernel."""
    changes = [{}, {"temperature": 7.5}, {"n": 17, "label_smoothing": 0.3}, {"n": 1, "ignore_index": 1}]
    changes.append(OTHER_NUMBERS.get(name.split("-")[4], {}))
    return [_recorded(name, change)[-1] for change in changes]


def _recorded(name: str, changes: dict[str, Any], scalar_only: bool = False) -> list[Launch]:
    """All launches up to the wanted one."""
    wanted, classes, dtype, capability, option = name.split("-")
    found: list[Launch] = []

    def record(kernel: Any, programs: int, device: torch.device, warps: int, arguments: dict[str, Any]) -> None:
        found.append((kernel, arguments, int(capability), warps))

    original = launch.launch
    distill_loss.launch = scale.launch = teachers.launch = record
    try:
        _run_everything(int(classes), DTYPES[dtype], scalar_only, **{**OPTIONS[option], **changes})
    finally:
        distill_loss.launch = scale.launch = teachers.launch = original
    if scalar_only:
        return found
    last = max(k for k, (kernel, *_) in enumerate(found) if kernel.__name__ == wanted)
    return found[: last + 1]


def _run_everything(classes: int, dtype: torch.dtype, scalar_only: bool, n: int = 2, **options: Any) -> None:
    """Both terms, labels, a mask and, in backward, every gradient: the launches that need most registers."""
    student = torch.zeros(n, classes, dtype=dtype)
    several = [student.clone() for _ in range(options.pop("teachers", 1))]
    rows = check_rows(
        "aot",
        student,
        several if len(several) > 1 else several[0],
        torch.zeros(n, dtype=torch.int64),
        mask=torch.ones(n, dtype=torch.bool),
        **{"temperature": 2.0, "label_smoothing": 0.1, **options},
    )
    weight = torch.ones(n)
    _, gradient = distill_loss.scalar(
        rows, weight=weight, soft_weight=1.0, hard_weight=0.5, mean=True, normalizer=None, needs_grad=True
    )
    if scalar_only:
        return
    stats = distill_loss.per_row(rows, terms=True)[2]
    needs = (True,) * (4 if len(several) == 1 else 4 + len(several))
    distill_loss.per_row_backward(rows, stats, weight, weight, needs)
    distill_loss.scale_gradient_(gradient, weight[0])
