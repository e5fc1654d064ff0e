"""The launches of distill_loss that test_triton_aot.py compiles: recorded from the wrapper itself."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from aot_recorder import Launch, recorded, unlaunched

import mfd_fast as mfd
from mfd_fast.backends.protocol import RowNeeds
from mfd_fast.backends.triton import distill_loss, scale
from mfd_fast.problems.rows import check_row_loss, check_rows

CAPABILITIES = (80, 90, 100)
CLASSES = (1000, 32000, 128256)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("distill_scalar", "distill_rows", "distill_rows_backward")
SPARSE_KERNELS = ("topk_scalar", "topk_rows")
OF_EXPONENTS = ("distill_rows_backward", "mixture_backward")
STANDARDIZE = mfd.LogitTransform(standardize=True)
DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward": {"divergence": mfd.ForwardKL()},
    "reverse": {"divergence": mfd.ReverseKL()},
    "jsd": {"divergence": mfd.JSD(0.3)},
    "skew": {"divergence": mfd.SkewKL()},
    "skewreverse": {"divergence": mfd.SkewReverseKL()},
    "tvd": {"divergence": mfd.TVD()},
    "alphabeta": {"divergence": mfd.AlphaBeta(0.5, 0.25)},
    "dkd": {"divergence": mfd.DKD()},
    "nkd": {"divergence": mfd.NKD()},
}
#: What a name ends in: options of the launch.
OPTIONS: dict[str, dict[str, Any]] = {
    **DIVERGENCES,
    "teachers": {"teachers": 3},
    "teachersnkd": {"teachers": 3, "divergence": mfd.NKD()},
    "standardized": {"student_transform": STANDARDIZE, "teacher_transform": STANDARDIZE},
}
#: Several teachers, and a gradient of their mixture with exponents.
EXPONENTS: dict[str, dict[str, Any]] = {
    "teachersdkd": {"teachers": 3, "divergence": mfd.DKD()},
    "teachersreverse": {"teachers": 3, "divergence": mfd.ReverseKL()},
    "teachersalphabeta": {"teachers": 3, "divergence": mfd.AlphaBeta(0.5, 0.25)},
}
#: The scalar loss with its parts, of all classes and of a sparse teacher.
PARTS: dict[str, dict[str, Any]] = {f"parts{option}": DIVERGENCES[option] for option in ("forward", "jsd", "dkd")}
PARTS["partsteachers"] = {"teachers": 3}
SPARSE_PARTS: dict[str, dict[str, Any]] = {"partsbucket": {"listed": 64, "tail": "bucket"}}
#: The same with other numbers, which must not compile anything new.
OTHER_NUMBERS: dict[str, dict[str, Any]] = {
    "jsd": {"divergence": mfd.JSD(0.9)},
    "alphabeta": {"divergence": mfd.AlphaBeta(2.0, -1.0)},
    "dkd": {"divergence": mfd.DKD(2.0, 0.0)},
    "nkd": {"divergence": mfd.NKD(0.0)},
}
#: Of a sparse teacher: how many classes it lists, its tail, the divergence.
SPARSE: dict[str, dict[str, Any]] = {
    "bucket": {"listed": 64, "tail": "bucket"},
    "bucketjsd": {"listed": 64, "tail": "bucket", "divergence": mfd.JSD(0.3)},
    "bucketdkd": {"listed": 64, "tail": "bucket", "divergence": mfd.DKD()},
    "bucketnkd": {"listed": 64, "tail": "bucket", "divergence": mfd.NKD()},
    "bucketlong": {"listed": 1000, "tail": "bucket", "divergence": mfd.AlphaBeta(0.5, 0.25)},
    "renormalize": {"listed": 64, "tail": "renormalize", "divergence": mfd.ReverseKL()},
    "zero": {"listed": 64, "tail": "zero"},
    "zeroalphabeta": {"listed": 64, "tail": "zero", "divergence": mfd.AlphaBeta(0.5, 0.25)},
    "zeroskew": {"listed": 64, "tail": "zero", "divergence": mfd.SkewKL(), "student_transform": STANDARDIZE},
}


EVERY = OPTIONS | EXPONENTS | SPARSE | PARTS | SPARSE_PARTS


def _names() -> list[str]:
    """On sm_90 every option in every kernel; lengths and dtypes take turns."""
    lengths, dtypes, sparse = itertools.cycle(CLASSES), itertools.cycle(DTYPES), itertools.cycle(SPARSE_KERNELS)
    names = []
    for option in OPTIONS:
        names += [f"{kernel}-{next(lengths)}-{next(dtypes)}-90-{option}" for kernel in KERNELS]
        next(lengths)
    names += [f"topk_scalar-{next(lengths)}-{next(dtypes)}-90-{option}" for option in SPARSE]
    names += [f"topk_rows-{next(lengths)}-{next(dtypes)}-90-{option}" for option in SPARSE]
    names += [f"distill_scalar-{next(lengths)}-{next(dtypes)}-90-{option}" for option in PARTS]
    names += [f"topk_scalar-{next(lengths)}-{next(dtypes)}-90-{option}" for option in SPARSE_PARTS]
    names += [f"mixture_backward-{c}-fp32-90-teachersnkd" for c in CLASSES]
    names += [f"{kernel}-128256-fp32-90-teachersalphabeta" for kernel in OF_EXPONENTS]
    for capability in (80, 100):
        names += [
            f"{kernel}-{next(lengths)}-{next(dtypes)}-{capability}-{option}"
            for kernel, option in (*zip(itertools.cycle(KERNELS), OPTIONS, strict=False), (next(sparse), "bucketjsd"))
        ]
    names += [f"distill_scalar-100-{d}-{cc}-forward" for d, cc in zip(DTYPES, CAPABILITIES, strict=False)]
    names += [f"{kernel}-1000-fp32-80-forward" for kernel in ("count_rows", "reduce_loss", "scale_in_place")]
    return names


def each(names: list[str]) -> list[str]:
    """The names ``kernel-x-dtype-capability...`` on every capability."""
    parts = [name.split("-") for name in names]
    return sorted({"-".join((*p[:3], str(cc), *p[4:])) for p in parts for cc in CAPABILITIES})


def _complete() -> list[str]:
    """Every kernel with every option, length and dtype on every capability."""
    shapes = list(itertools.product(CLASSES, DTYPES, CAPABILITIES))
    names = [f"{k}-{c}-{d}-{cc}-{o}" for k, o in itertools.product(KERNELS, OPTIONS) for c, d, cc in shapes]
    names += [f"{k}-{c}-{d}-{cc}-{o}" for k, o in itertools.product(SPARSE_KERNELS, SPARSE) for c, d, cc in shapes]
    names += [f"distill_scalar-{c}-{d}-{cc}-{o}" for o in PARTS for c, d, cc in shapes]
    names += [f"topk_scalar-{c}-{d}-{cc}-{o}" for o in SPARSE_PARTS for c, d, cc in shapes]
    names += [f"{k}-{c}-{d}-{cc}-{o}" for k, o in itertools.product(OF_EXPONENTS, EXPONENTS) for c, d, cc in shapes]
    return names + [f"mixture_backward-{c}-{d}-{cc}-{o}" for o in OPTIONS if "teachers" in o for c, d, cc in shapes]


NAMES = _names()
EACH = each(NAMES)
COMPLETE = sorted({*NAMES, *_complete()})


def is_plain(name: str) -> bool:
    """Whether the scalar kernel of this name is `plain_scalar`, which has a road with a column per thread as well."""
    return name.startswith("distill_scalar") and "parts" not in name and distill_loss.is_plain(_problem(name, {})[0])


def launches(name: str) -> Launch:
    """(kernel, arguments, capability, warps, options) of ``kernel-classes-dtype-capability-option``."""
    return _recorded(name, {})


def launched(name: str) -> list[str]:
    """The kernels of a call of the scalar loss, its gradient included."""
    return [kernel.fn.__name__ for kernel, *_ in unlaunched(lambda: _scalar(*_problem(name, {}), "parts" in name))]


def variants(name: str) -> list[Launch]:
    """The same launch with other numbers and slices of what is beside the logits; all must use one compiled kernel."""
    changes = [{}, {"temperature": 7.5}, {"n": 17, "label_smoothing": 0.3}, {"n": 1, "ignore_index": 1}]
    changes += [OTHER_NUMBERS.get(name.split("-")[4], {}), {"skipped": 1}, {"skipped": 3}]
    return [_recorded(name, change) for change in changes]


def _recorded(name: str, changes: dict[str, Any]) -> Launch:
    wanted, _, _, capability, _ = name.split("-")
    rows, weight = _problem(name, changes)
    if is_plain(name):
        wanted = "plain_scalar"
    return recorded(wanted, int(capability), lambda: _run_everything(rows, weight, "parts" in name))


def _problem(name: str, changes: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Rows with labels and a mask, and the weights."""
    _, columns, dtype, _, option = name.split("-")
    options = {"n": 2, "temperature": 2.0, "label_smoothing": 0.1, **EVERY[option], **changes}
    n, classes = options.pop("n"), int(columns)
    student = torch.zeros(n, classes, dtype=DTYPES[dtype])
    teacher: Any = [student.clone() for _ in range(options.pop("teachers", 1))]
    if "listed" in options:
        indices = torch.arange(options.pop("listed")).expand(n, -1).contiguous()
        teacher = mfd.TopK(torch.zeros(indices.shape, dtype=student.dtype), indices, tail=options.pop("tail"))
    elif len(teacher) == 1:
        teacher = teacher[0]
    skipped = options.pop("skipped", 0)
    labels = torch.zeros(n + skipped, dtype=torch.int64)[skipped:]
    mask = torch.ones(n + skipped, dtype=torch.bool)[skipped:]
    weight = torch.ones(n + skipped)[skipped:]
    return check_rows("aot", student, teacher, labels, mask=mask, **options), weight


def _scalar(rows: Any, weight: torch.Tensor, parts: bool) -> Any:
    loss = check_row_loss(rows, 1.0, 0.5, weight, "mean", None)
    return distill_loss.scalar(rows, loss, needs_grad=True, parts=parts)


def _run_everything(rows: Any, weight: torch.Tensor, parts: bool) -> None:
    """Both terms and, in backward, every gradient: the launches that need most registers."""
    gradient = _scalar(rows, weight, parts).student
    stats = distill_loss.per_row(rows, terms=True)[2]
    several = len(rows.teachers) > 1
    needs = RowNeeds(True, True, True, several, [True] * len(rows.teachers))
    distill_loss.per_row_backward(rows, stats, weight, weight, needs)
    scale.scale_gradient_(gradient, weight[0])
