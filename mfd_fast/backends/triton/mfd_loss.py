"""mfd_loss on Triton: one launch for the loss and all row gradients. The kernel is in ``kernels/triton/mfd_loss.py``.

A second launch adds up the partial sums of the programs in a fixed order: a program that waited for the others and
did it in the same launch would do alone what this one spreads over the processors. The head weight's gradient is
one library GEMM. Calls that the kernel does not cover run as a chain of the other ops (:func:`has_one_pass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...contract import check_labels_in_range
from ...reference.feature_loss import KINDS
from ...rows import is_used
from .. import allocate
from ..layout import row_layout
from . import distill_loss
from . import modal_pool as pooling
from .blocks import common_unit
from .launch import finish, kernels, launch, number
from .reduce_columns import ColumnSums
from .row_arguments import kind_of, parameters

ROWS = 16  # of a program: the least that a tensor core takes
TILE_BYTES = 256  # of each row of a tile of a matrix product
TILE_D = 64  # columns of a tile of features
STEP_BYTES = 128  # of each row's summands per step of a matrix product
WARPS = 4
OPTIONS = {"num_stages": 3}  # the next tiles are on their way
# Beyond these the library's GEMMs and kernels that own a whole row are the better tiles, or the code too long.
MAX_CLASSES = 2048
MAX_WIDTH = 2048
MAX_ROWS = 8192
MAX_MODALITIES = 8


def can_run(problem: Any) -> str | None:
    """None if the kernels cover this call, else the reason."""
    return pooling.can_run(problem.pool) or distill_loss.can_run(problem.rows)


def has_one_pass(p: Any) -> bool:
    """Whether the single launch covers this call: a matter of shapes, dtypes and options, never of values."""
    rows = p.rows
    return (
        rows.dtype == torch.float32
        and (is_used(p.soft_weight) or is_used(p.hard_weight))
        and rows.classes <= MAX_CLASSES
        and p.pool.width <= MAX_WIDTH
        and rows.n_rows <= MAX_ROWS
        and p.pool.modalities <= MAX_MODALITIES
    )


def _operand_dtype(p: Any) -> torch.dtype:
    """Dtype of the matrix products' operands: 16 bits where features and head have the same 16 bits."""
    first = p.head_weight.dtype
    sixteen = first in (torch.bfloat16, torch.float16)
    return first if sixteen and all(x.dtype == first for x in p.pool.features) else torch.float32


def _padded(classes: int) -> int:
    """Length of a parked row of logits: whole 16-byte words of any dtype."""
    return -(-classes // 16) * 16


def _tile(most: int, *counts: int) -> int:
    return max(16, min(most, 1 << (max(counts) - 1).bit_length()))


def scalar(p: Any, needs: Sequence[bool]) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The fields of MFDOutput, and the gradients of query, bias, head weight, head bias and each of the features."""
    rows, pool, device = p.rows, p.pool, p.device
    check_labels_in_range(rows.op, rows)
    n, classes, width, dtype = rows.n_rows, rows.classes, pool.width, rows.dtype
    need_query, need_bias, need_head_weight, need_head_bias, *need_features = needs
    sums = ColumnSums(-(-n // ROWS), device)
    terms = [sums.add((), dtype, torch.float64) for _ in range(4)]
    query = sums.add((width,), pool.query.dtype, dtype) if need_query else None
    bias = sums.add((pool.modalities,), pool.bias.dtype, dtype) if need_bias else None
    head_bias = sums.add((classes,), p.head_bias.dtype, dtype) if need_head_bias else None
    d_features, feature_outputs = pooling.feature_gradients(pool, need_features)
    weights = allocate.empty((*p.leading, pool.modalities), dtype, device)
    predictions = allocate.empty(tuple(p.leading), torch.int64, device)
    if n == 0:
        for out in sums.outs:
            out.zero_()
        d_head_weight = torch.zeros_like(p.head_weight) if need_head_weight else None
    else:
        operand = _operand_dtype(p)
        pool_needed = need_query or need_bias or any(need_features)
        scratch: dict[str, Any] = {
            "y_ptr": allocate.empty((n, width), operand, device),
            "z_ptr": allocate.empty((n, _padded(classes)), dtype, device),
            "dz_ptr": allocate.empty((n, _padded(classes)), operand, device) if any(needs) else None,
            "dy_ptr": allocate.empty((n, width), dtype, device) if pool_needed else None,
        }
        outputs = {
            "weights_ptr": weights,
            "predictions_ptr": predictions,
            "terms_ptrs": tuple(partial for partial, _ in terms),
            "query_partial_ptr": None if query is None else query[0],
            "bias_partial_ptr": None if bias is None else bias[0],
            "head_bias_partial_ptr": None if head_bias is None else head_bias[0],
        }
        arguments = _pool_arguments(pool) | _row_arguments(p) | scratch | outputs | feature_outputs
        launch(kernels("mfd_loss").mfd_single_pass, sums.n_partials, device, WARPS, arguments, **OPTIONS)
        sums.run()
        d_head_weight = None
        if need_head_weight:
            with torch.autocast(device.type, enabled=False):
                dz = scratch["dz_ptr"][:, :classes]
                d_head_weight = (dz.t() @ scratch["y_ptr"]).to(p.head_weight.dtype)
    gradients = [
        None if query is None else query[1],
        None if bias is None else bias[1],
        d_head_weight,
        None if head_bias is None else head_bias[1],
        *(None if pair is None else finish(*pair) for pair in d_features),
    ]
    return (*(out for _, out in terms), weights, predictions), gradients


def _pool_arguments(pool: Any) -> dict[str, Any]:
    """The arguments of the pool, under the names that the single pass gives them."""
    found = pooling.pool_arguments(pool)
    names = {
        "temperature_ptr": "pool_temperature_ptr",
        "temperature": "pool_temperature",
        "scale": "pool_scale",
        "STEP": "POOL_STEP",
        "EXACT": "POOL_EXACT",
    }
    dropped = ("scores_ptr", "n_rows", "DTYPE")
    return {names.get(name, name): value for name, value in found.items() if name not in dropped}


def _row_arguments(p: Any) -> dict[str, Any]:
    """Head, teacher, labels, weights, divisor and the shapes of the tiles."""
    rows = p.rows
    n, classes = rows.n_rows, rows.classes
    head = p.head_weight if p.head_weight.stride(1) == 1 or p.pool.width == 1 else p.head_weight.contiguous()
    teacher = row_layout(rows.teacher)
    flat = teacher.inner >= n
    outer = 0 if flat else teacher.outer_stride
    unit = common_unit(classes, outer, teacher.row_stride)
    soft, hard = is_used(p.soft_weight), rows.labels is not None and is_used(p.hard_weight)
    features = row_layout(p.teacher_features) if is_used(p.feature_weight) else None
    # Row counts must not reach the compiler as the inner counts of flat layouts.
    inner, features_outer = 1, 0
    if features is not None and features.inner < n:
        inner, features_outer = features.inner, features.outer_stride
    target = p.teacher_pool_weights.contiguous() if is_used(p.pool_weight) else None
    numbers: dict[str, Any] = {}
    for name, value in (
        ("temperature", rows.temperature),
        ("teacher_temperature", rows.teacher_temperature),
        ("soft_weight", p.soft_weight),
        ("hard_weight", p.hard_weight),
        ("feature_weight", p.feature_weight),
        ("pool_weight", p.pool_weight),
    ):
        numbers[name], numbers[f"{name}_ptr"] = number(value, head)
    count = p.reduction == "mean" and p.normalizer is None
    everything = rows.labels is None and rows.mask is None
    divisor = 1.0 if p.reduction == "sum" else float(n) if count else p.normalizer
    numbers["normalizer"], numbers["normalizer_ptr"] = number(divisor, head)
    numbers["a"], numbers["b"] = parameters(rows.divergence)
    size = 1 << (classes - 1).bit_length()
    vec = min(8, size)
    lanes = min(32, size // vec)  # a warp per row
    steps = (numbers["temperature_ptr"], numbers["teacher_temperature_ptr"])
    return numbers | {
        "head_ptr": head,
        "head_stride": head.stride(0),
        "head_bias_ptr": None if p.head_bias is None else p.head_bias.contiguous(),
        "teacher_ptr": teacher.tensor,
        "teacher_inner": 1 if flat else teacher.inner,
        "teacher_outer": outer // unit,
        "teacher_stride": teacher.row_stride // unit,
        "T_FLAT": flat,
        "labels_ptr": rows.labels,
        "mask_ptr": rows.mask,
        "weight_ptr": p.weight,
        "features_ptr": None if features is None else features.tensor,
        "features_inner": inner,
        "features_outer": features_outer,
        "features_stride": 0 if features is None else features.row_stride,
        "F_FLAT": features is None or features.inner >= n,
        "pool_target_ptr": target,
        "smoothing": float(rows.label_smoothing),
        "n_rows": n,
        "ignore_index": rows.ignore_index,
        "classes": classes // unit,
        "z_stride": _padded(classes),
        "T_STEP": 0 if steps[0] is None or steps[0].dim() == 0 else 1,
        "TT_STEP": 0 if steps[1] is None or steps[1].dim() == 0 else 1,
        "COUNT": count and not everything,
        "DIVERGENCE": kind_of(rows.divergence if soft else None),
        "HARD": hard,
        "SMOOTH": hard and rows.label_smoothing != 0,
        "SQUARED": rows.scale_by_temperature,
        "KIND": KINDS.index(p.feature_kind),
        # 16-bit logits do not deserve the slower exponentials.
        "EXACT": torch.float32 in (_operand_dtype(p), teacher.tensor.dtype),
        "CONTIGUOUS": unit >= 4,
        "UNIT": unit,
        "ROWS": ROWS,
        "GROUP": WARPS,
        "BLOCK_C": _tile(TILE_BYTES // _operand_dtype(p).itemsize, classes, p.pool.width),
        "BLOCK_D": _tile(TILE_D, p.pool.width),
        "BLOCK_K": _tile(STEP_BYTES // _operand_dtype(p).itemsize, classes, p.pool.width),
        "LANES": lanes,
        "VEC": vec,
    }
