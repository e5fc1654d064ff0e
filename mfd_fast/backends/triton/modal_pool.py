"""modal_pool on Triton: arguments, allocation and launches. The kernels are in ``kernels/triton/pool``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problems.pool import PoolProblem
from .. import allocate
from ..layout import row_layout
from ..plans import Places
from ..protocol import PoolGradients, PoolNeeds
from . import program, why_not_device
from .launch import aligned, constants, finish, gradient, kernels, launch, number
from .reduce_columns import ColumnSums

MAX_MODALITIES = 32  # the loops over modalities are unrolled
MAX_WIDTH = 2**31 - 2**16  # column numbers are int32
MAX_PROGRAMS = 512  # of the backward pass: so many partial sums
PER_THREAD = 64  # registers for tiles


class PoolBlocks(NamedTuple):
    """Tile [rows, width] of a program of ``warps`` warps; ``loop``: the M features of a row are read in tiles."""

    rows: int
    width: int
    loop: bool
    warps: int


def pool_blocks(modalities: int, width: int, double: bool) -> PoolBlocks:
    """M features, the query, dpooled and the sum for dquery are held where they fit into the registers."""
    budget = PER_THREAD // 2 if double else PER_THREAD
    tile = 1 << (width - 1).bit_length()
    tiles = modalities + 3
    if tiles * tile <= budget * 256:
        warps = 8 if tiles * tile > budget * 128 else 4
        rows = 1
        while rows < 16 and tiles * tile * 2 * rows <= budget * 32 * warps:
            rows *= 2
        return PoolBlocks(rows, tile, False, warps)
    return PoolBlocks(1, min(tile, 1024 if double else 2048), True, 4)


def can_run(problem: PoolProblem) -> str | None:
    """None if the kernels cover this call, else the reason."""
    if problem.modalities > MAX_MODALITIES:
        return f"the kernel is unrolled over at most {MAX_MODALITIES} modalities, not {problem.modalities}"
    if problem.width > MAX_WIDTH:
        return f"at most {MAX_WIDTH} columns"
    return why_not_device(problem.device)


def features(tensors: Sequence[Tensor], n: int) -> Any:
    """The argument tuple of rows of features, `modal_pool.Features`."""
    layouts = [row_layout(x) for x in tensors]
    flat = all(layout.inner >= n for layout in layouts)
    inners = () if flat else tuple(layout.inner for layout in layouts)
    outers = () if flat else tuple(layout.outer_stride for layout in layouts)
    strides = tuple(layout.row_stride for layout in layouts)
    pointers = tuple(layout.tensor for layout in layouts)
    return kernels("pool.modal_pool").Features(pointers, inners, outers, strides, **constants({"FLAT": flat}))


def no_features() -> Any:
    """The argument tuple of features that are not there."""
    return kernels("pool.modal_pool").Features((None,), (), (), (0,), **constants({"FLAT": True}))


def pool_problem(p: PoolProblem) -> tuple[Any, float]:
    """`modal_pool.PoolProblem`, and the temperature where it is a number."""
    tau = p.temperature
    if isinstance(tau, Tensor) and tau.dim():
        tau = tau.reshape(-1)
    temperature, temperature_ptr = number(tau, p.features[0])
    x = features(p.modality_features(), p.leading.numel())
    pointers = [aligned(value) for value in (p.query, p.scores, p.bias, p.present)]
    step = 0 if temperature_ptr is None or temperature_ptr.dim() == 0 else 1
    numbers = {"M": p.modalities, "M_TILE": 1 << (p.modalities - 1).bit_length(), "STEP": step}
    return kernels("pool.modal_pool").PoolProblem(x, *pointers, temperature_ptr, **constants(numbers)), temperature


def pool_how(p: PoolProblem, loop: bool, rows: int, width: int) -> Any:
    """`modal_pool.PoolHow`: arithmetic and tile."""
    floating = [t for t in (*p.features, p.scores) if t is not None]
    # 16-bit features do not deserve the slower exponentials; float64 has its own.
    exact = any(t.dtype in (torch.float32, torch.float64) for t in floating)
    fields = {"EXACT": exact, "FLOAT64": p.dtype == torch.float64, "LOOP": loop, "ROWS": rows, "BLOCK_D": width}
    return kernels("pool.modal_pool").PoolHow(**constants(fields))


def _common(p: PoolProblem) -> tuple[dict[str, Any], PoolBlocks]:
    blocks = pool_blocks(p.modalities, p.width, p.dtype == torch.float64)
    problem, temperature = pool_problem(p)
    how = pool_how(p, blocks.loop, blocks.rows, blocks.width)
    numbers = {"temperature": temperature, "scale": float(p.scale), "n_rows": p.leading.numel(), "width": p.width}
    return {"p": problem, "how": how, **numbers}, blocks


def forward(p: PoolProblem) -> tuple[Tensor, Tensor]:
    """pooled ``[..., D]`` and weights ``[..., M]``."""
    like = p.features[0].new_empty((), dtype=p.out_dtype).expand(*p.leading, p.width)
    written, pooled = gradient(like)
    weights = allocate.empty((*p.leading, p.modalities), p.dtype, p.device)
    n = p.leading.numel()
    if n:
        common, blocks = _common(p)
        outputs = {"pooled_ptr": written, "weights_ptr": weights}
        kernel = kernels("pool.modal_pool").pool_forward
        launch(kernel, -(-n // blocks.rows), p.device, blocks.warps, common | outputs)
    return finish(written, pooled), weights


def call_plan(p: PoolProblem, places: Places) -> Any:
    """The native plan of :func:`forward` and of the usual :func:`backward`, that of a contiguous dpooled alone, for
    calls like this one, or None.
    """
    if isinstance(p.temperature, Tensor) or not program.can_plan(places):
        return None
    leaves = (p.query, p.scores, p.bias, None, *p.features)
    needs = tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in leaves)
    pooled = torch.empty((*p.leading, p.width), dtype=p.out_dtype, device=p.device)
    weights = torch.empty((*p.leading, p.modalities), dtype=p.dtype, device=p.device)

    of_query, of_scores, of_bias, of_temperature, *of_features = needs
    wanted = PoolNeeds(of_query, of_scores, of_bias, of_temperature, of_features)

    def of_backward(again: PoolProblem) -> Any:
        def gradients() -> Any:
            found = backward(again, weights, pooled, None, wanted)
            return *found[:4], *found.features

        return gradients

    def of_forward(again: PoolProblem) -> Any:
        return lambda: forward(again)

    return program.plan(
        places, p.dtype, of_forward, backward=program.WrittenBackward(of_backward, (weights, pooled), needs)
    )


def feature_gradients(
    p: PoolProblem, needs: Sequence[bool]
) -> tuple[list[tuple[Tensor, Tensor] | None], tuple[Tensor | None, ...], int]:
    """(written, returned) per feature tensor; per modality where the kernel writes, and the stride of these rows."""
    found = [gradient(x) if need else None for x, need in zip(p.features, needs, strict=True)]
    if p.stacked:
        (one,) = found
        parts: list[Tensor | None] = [None] * p.modalities if one is None else list(one[0].unbind(-2))
        return found, tuple(parts), p.modalities * p.width
    return found, tuple(None if pair is None else pair[0] for pair in found), p.width


def backward(
    p: PoolProblem, weights: Tensor, d_pooled: Tensor | None, d_weights: Tensor | None, needs: PoolNeeds
) -> PoolGradients:
    """Gradients of query, scores, bias, temperature and each of the features."""
    need_query, need_scores, need_bias, need_temperature, need_features = needs
    n = p.leading.numel()
    per_row = need_temperature and isinstance(p.temperature, Tensor) and p.temperature.dim() > 0
    shared = need_query or need_bias or (need_temperature and not per_row)
    common, blocks = _common(p)
    programs = -(-n // blocks.rows)
    if shared:
        programs = min(programs, MAX_PROGRAMS)
    sums = ColumnSums(programs, p.device)
    query_partial = bias_partial = temperature_partial = None
    d_query = d_bias = d_temperature = None
    if need_query and p.query is not None:
        query_partial, d_query = sums.add((p.width,), p.query.dtype, p.dtype)
    if need_bias and p.bias is not None:
        bias_partial, d_bias = sums.add((p.modalities,), p.bias.dtype, p.dtype)
    if per_row:
        d_temperature = allocate.empty(tuple(p.leading), p.dtype, p.device)
    elif need_temperature:
        temperature_partial, d_temperature = sums.add((), p.dtype, torch.float64)
    scores = gradient(p.scores) if need_scores and p.scores is not None else None
    d_features, dx_ptrs, dx_stride = feature_gradients(p, need_features)
    if n == 0:
        sums.zero()
    else:
        module = kernels("pool.modal_pool")
        outputs = module.PoolGradients(
            weights_ptr=aligned(weights),
            d_pooled=features([d_pooled], n) if d_pooled is not None else no_features(),
            d_weights_ptr=aligned(d_weights),
            dx_ptrs=dx_ptrs,
            d_scores_ptr=None if scores is None else scores[0],
            d_temperature_ptr=d_temperature if per_row else None,
            query_partial_ptr=query_partial,
            bias_partial_ptr=bias_partial,
            temperature_partial_ptr=temperature_partial,
        )
        arguments = common | {"of": outputs, "dx_stride": dx_stride}
        launch(module.pool_backward, programs, p.device, blocks.warps, arguments)
        sums.run()
    d_scores = None if scores is None else finish(*scores)
    finished = [None if x is None else finish(*x) for x in d_features]
    return PoolGradients(d_query, d_scores, d_bias, d_temperature, finished)
