"""mfd_loss on Triton: one launch for the loss and all row gradients. The kernel is in ``kernels/triton/mfd``.

A second launch adds up the partial sums of the programs in a fixed order: a program that waited for the others and
did it in the same launch would do alone what this one spreads over the processors. The head weight's gradient is
one library GEMM. Calls that the kernel does not cover run as a chain of the other ops (:func:`has_one_pass`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codes import FEATURE_KINDS
from ...divergences import AlphaBeta
from ...problems.checks import is_used
from ...problems.mfd import MFDProblem
from ...problems.rows import Scalar, check_labels_in_range
from ...types import MFDOutput
from .. import allocate
from ..layout import row_layout
from ..plans import Places, label_places
from ..protocol import MFDGradients, MFDNeeds
from . import distill_loss, program
from . import modal_pool as pooling
from .blocks import common_unit
from .launch import aligned, constants, finish, head_gradient, kernels, launch, number
from .reduce_columns import ColumnSums
from .row_arguments import kind_of, logits_argument, parameters
from .scale import like_gradient, scale_gradients_

ROWS = 16  # of a program: the least that a tensor core takes
TILE_BYTES = 256  # of each row of a tile of a matrix product
TILE_D = 64  # columns of a tile of features
# Summands per step of a matrix product, by bytes of an operand: those of float32 are in registers, not in tensor cores.
STEP = {2: 64, 4: 16}
WARPS = 4
OPTIONS = {"num_stages": 3}  # the next tiles are on their way
# Beyond these the library's GEMMs and kernels that own a whole row are the better tiles, or the code too long.
MAX_CLASSES = 2048
MAX_WIDTH = 2048
MAX_ROWS = 8192
MAX_MODALITIES = 8


def can_run(problem: MFDProblem) -> str | None:
    """None if the kernels cover this call, else the reason."""
    return pooling.can_run(problem.pool) or distill_loss.can_run(problem.rows)


def has_one_pass(p: MFDProblem) -> bool:
    """Whether the single launch covers this call: a matter of shapes, dtypes and options, never of values."""
    rows = p.rows
    return (
        rows.dtype == torch.float32
        and rows.ignored_labels == "row"
        and p.loss.hard_normalizer is None
        and (p.loss.use_soft or p.loss.use_hard)
        and rows.classes <= MAX_CLASSES
        and p.pool.width <= MAX_WIDTH
        and rows.n_rows <= MAX_ROWS
        and p.pool.modalities <= MAX_MODALITIES
    )


def _operand_dtype(p: MFDProblem) -> torch.dtype:
    """Dtype of the matrix products' operands: 16 bits where features and head have the same 16 bits."""
    first = p.head_weight.dtype
    sixteen = first in (torch.bfloat16, torch.float16)
    return first if sixteen and all(x.dtype == first for x in p.pool.features) else torch.float32


def _padded(classes: int) -> int:
    """Length of a parked row of logits: whole 16-byte words of any dtype."""
    return -(-classes // 16) * 16


def _tile(most: int, *counts: int) -> int:
    return max(16, min(most, 1 << (max(counts) - 1).bit_length()))


def scalar(p: MFDProblem, needs: MFDNeeds) -> tuple[MFDOutput, MFDGradients]:
    """The outputs and, from the same launch, all gradients."""
    rows, pool, device = p.rows, p.pool, p.device
    check_labels_in_range(rows.op, rows)
    n, classes, width, dtype = rows.n_rows, rows.classes, pool.width, rows.dtype
    need_query, need_bias, need_head_weight, need_head_bias, need_features = needs
    sums = ColumnSums(-(-n // ROWS), device)
    terms = [sums.add((), dtype, torch.float64) for _ in range(4)]
    query = sums.add((width,), pool.query.dtype, dtype) if need_query and pool.query is not None else None
    bias = sums.add((pool.modalities,), pool.bias.dtype, dtype) if need_bias and pool.bias is not None else None
    head_bias = sums.add((classes,), p.head_bias.dtype, dtype) if need_head_bias and p.head_bias is not None else None
    d_features, dx_ptrs, dx_stride = pooling.feature_gradients(pool, need_features)
    weights = allocate.empty((*p.leading, pool.modalities), dtype, device)
    predictions = allocate.empty(tuple(p.leading), torch.int64, device)
    if n == 0:
        sums.zero()
        d_head_weight = torch.zeros_like(p.head_weight) if need_head_weight else None
    else:
        operand = _operand_dtype(p)
        pool_needed = need_query or need_bias or any(need_features)
        y = allocate.empty((n, width), operand, device)
        z = allocate.empty((n, _padded(classes)), dtype, device)
        dz = (
            allocate.empty((n, _padded(classes)), operand, device)
            if pool_needed or need_head_weight or need_head_bias
            else None
        )
        module = kernels("mfd.single_pass")
        pool_outputs = dict.fromkeys(kernels("pool.modal_pool").PoolGradients._fields)
        pool_outputs |= {
            "dx_ptrs": dx_ptrs,
            "query_partial_ptr": None if query is None else query[0],
            "bias_partial_ptr": None if bias is None else bias[0],
        }
        outputs = module.Outputs(
            y_ptr=y,
            z_ptr=z,
            dz_ptr=dz,
            dy_ptr=allocate.empty((n, width), dtype, device) if pool_needed else None,
            weights_ptr=weights,
            predictions_ptr=predictions,
            terms_ptrs=tuple(partial for partial, _ in terms),
            head_bias_partial_ptr=None if head_bias is None else head_bias[0],
            pool=kernels("pool.modal_pool").PoolGradients(**pool_outputs),
        )
        arguments = _arguments(p, z) | {"out": outputs, "dx_stride": dx_stride}
        launch(module.mfd_single_pass, sums.n_partials, device, WARPS, arguments, **OPTIONS)
        sums.run()
        d_head_weight = None
        if need_head_weight:
            assert dz is not None
            d_head_weight = head_gradient(dz, y, classes, p.head_weight.dtype)
    gradients = MFDGradients(
        None if query is None else query[1],
        None if bias is None else bias[1],
        d_head_weight,
        None if head_bias is None else head_bias[1],
        [None if pair is None else finish(*pair) for pair in d_features],
    )
    loss, soft, hard, feature = (out for _, out in terms)
    return MFDOutput(loss, soft, hard, feature, weights, predictions), gradients


def call_plan(p: MFDProblem, places: Places) -> Any:
    """The native plan of :func:`scalar` for calls like this one, or None."""
    if not program.can_plan(places):
        return None
    leaves = (p.pool.query, p.pool.bias, p.head_weight, p.head_bias, *p.pool.features)
    need = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in leaves]
    of_query, of_bias, of_head_weight, of_head_bias, *of_features = need
    needs = MFDNeeds(of_query, of_bias, of_head_weight, of_head_bias, of_features)

    def forward(problem: MFDProblem) -> Any:
        def results() -> Any:
            outputs, gradients = scalar(problem, needs)
            return tuple(outputs), [*gradients[:4], *gradients.features]

        return results

    gradients = [like_gradient(leaf) for leaf, n in zip(leaves, need, strict=True) if n and leaf is not None]
    labels = label_places(places, p.rows)
    return program.plan(places, p.rows.dtype, forward, labels, scale=scale_gradients_, gradients=gradients)


def _arguments(p: MFDProblem, z: Tensor) -> dict[str, Any]:
    """Everything that the kernel reads, and the shapes of its tiles."""
    rows, pool = p.rows, p.pool
    n, classes = rows.n_rows, rows.classes
    head = p.head_weight if p.head_weight.stride(1) == 1 or pool.width == 1 else p.head_weight.contiguous()
    problem, pool_temperature = pooling.pool_problem(pool)
    block_d = _tile(TILE_D, pool.width)
    row_problem, numbers = _row_problem(p, z)
    extra, extra_numbers = _extra(p, head)
    divisor: Scalar = 1.0
    if p.loss.reduction == "mean":
        divisor = float(n) if p.loss.normalizer is None else p.loss.normalizer
    loss, loss_numbers = distill_loss.loss_arguments(rows, p.loss, divisor)
    operand_bytes = _operand_dtype(p).itemsize
    tiles = {
        "ROWS": ROWS,
        "BLOCK_C": _tile(TILE_BYTES // operand_bytes, classes, pool.width),
        "BLOCK_D": block_d,
        "BLOCK_K": _tile(STEP[operand_bytes], classes, pool.width),
    }
    return {
        "pool": problem,
        "rows": row_problem,
        "loss": loss,
        "extra": extra,
        "pool_how": pooling.pool_how(pool, True, ROWS, block_d),
        "how": _how(p, row_problem),
        "tiles": kernels("mfd.single_pass").Tiles(**constants(tiles)),
        "pool_temperature": pool_temperature,
        "pool_scale": float(pool.scale),
        "n_rows": n,
        "ignore_index": rows.ignore_index,
        "width": pool.width,
        "z_stride": _padded(classes),
        **numbers,
        **extra_numbers,
        **loss_numbers,
    }


def _row_problem(p: MFDProblem, z: Tensor) -> tuple[Any, dict[str, Any]]:
    """`structs.RowProblem`, whose student's logits are those that the kernel parks, and its numbers."""
    rows = p.rows
    teacher = row_layout(rows.teacher)
    flat = teacher.inner >= rows.n_rows
    outer = 0 if flat else teacher.outer_stride
    unit = common_unit(rows.classes, outer, teacher.row_stride)
    temperature, temperature_ptr = number(rows.temperature, z)
    teacher_temperature, teacher_temperature_ptr = number(rows.teacher_temperature, z)
    a, b = parameters(rows.divergence)
    problem = kernels("rows.structs").RowProblem(
        student=logits_argument(z, temperature_ptr, 1, True),
        teacher=logits_argument(teacher.tensor, teacher_temperature_ptr, unit, flat),
        labels_ptr=aligned(rows.labels),
        mask_ptr=aligned(rows.mask),
        **dict.fromkeys(("more_ptrs", "more_inner", "more_outer", "more_row", "weights_ptr")),
        **constants({"WEIGHTS_PER_ROW": False, "KEEPS_IGNORED": False}),
    )
    numbers = {"temperature": temperature, "teacher_temperature": teacher_temperature, "a": a, "b": b}
    numbers |= {"smoothing": float(rows.label_smoothing), "classes": rows.classes // unit}
    # Row counts must not reach the compiler as the inner counts of flat layouts.
    numbers |= {"teacher_inner": 1 if flat else teacher.inner, "teacher_outer": outer // unit}
    return problem, numbers | {"teacher_stride": teacher.row_stride // unit}


def _extra(p: MFDProblem, head: Tensor) -> tuple[Any, dict[str, Any]]:
    """`single_pass.Extra` and its numbers."""
    rows = p.rows
    features = None
    if is_used(p.feature_weight) and p.teacher_features is not None:
        features = row_layout(p.teacher_features)
    target = aligned(p.teacher_pool_weights) if is_used(p.pool_weight) else None
    feature_weight, feature_weight_ptr = number(p.feature_weight, head)
    pool_weight, pool_weight_ptr = number(p.pool_weight, head)
    count = p.loss.reduction == "mean" and p.loss.normalizer is None
    everything = rows.labels is None and rows.mask is None
    flat = features is None or features.inner >= rows.n_rows
    flags = {"F_FLAT": flat, "FEATURE_KIND": FEATURE_KINDS[p.feature_kind], "COUNT": count and not everything}
    pointers = (head, aligned(p.head_bias), None if features is None else features.tensor, target)
    extra = kernels("mfd.single_pass").Extra(*pointers, feature_weight_ptr, pool_weight_ptr, **constants(flags))
    numbers = {"feature_weight": feature_weight, "pool_weight": pool_weight, "head_stride": head.stride(0)}
    numbers |= {"features_inner": 1, "features_outer": 0, "features_stride": 0}
    if features is not None:
        numbers["features_stride"] = features.row_stride
        if not flat:
            numbers |= {"features_inner": features.inner, "features_outer": features.outer_stride}
    return extra, numbers


def _how(p: MFDProblem, row_problem: Any) -> Any:
    """`structs.How` of the rows of logits: a warp per row."""
    rows = p.rows
    soft, hard = p.loss.use_soft, rows.labels is not None and p.loss.use_hard
    size = 1 << (rows.classes - 1).bit_length()
    vec = min(16 // row_problem.teacher.ptr.dtype.itemsize, size)
    if soft and isinstance(rows.divergence, AlphaBeta):  # which takes the most registers
        vec = min(vec, 4)
    fields = {
        "DIVERGENCE": kind_of(rows.divergence if soft else None),
        "HARD": hard,
        "SMOOTH": hard and rows.label_smoothing != 0,
        "TERMS": False,
        "SQUARED": rows.scale_by_temperature,
        # 16-bit logits do not deserve the slower exponentials.
        "EXACT": torch.float32 in (_operand_dtype(p), row_problem.teacher.ptr.dtype),
        "FLOAT64": False,
        "CONTIGUOUS": row_problem.teacher.UNIT.value >= 4,
        "LOOP": True,
        "ROWS": WARPS,
        "LANES": min(32, size // vec),
        "VEC": vec,
    }
    return kernels("rows.structs").How(**constants(fields))
