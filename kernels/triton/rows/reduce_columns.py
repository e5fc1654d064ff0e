"""Column sums of matrices of partial sums: the second, fixed-order stage of every sum over rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_partials"])
def reduce_columns(
    partial_ptrs,
    out_ptrs,
    strides,
    lengths,
    n_partials: tl.int64,
    COUNT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[k][c] = sum over p < n_partials of partial[k][p, c], in float64; programs are dealt out to k in turn."""
    block = tl.program_id(0)
    for k in tl.static_range(COUNT):
        length = lengths[k]
        if (block >= 0) & (block * BLOCK_C < length):
            col = block * BLOCK_C + tl.arange(0, BLOCK_C)
            keep = col < length
            total = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
            for first in range(0, n_partials, BLOCK_P):
                p = first + tl.arange(0, BLOCK_P).to(tl.int64)
                at = partial_ptrs[k] + p[:, None] * strides[k] + col[None, :]
                total += tl.load(at, mask=(p < n_partials)[:, None] & keep[None, :], other=0.0).to(tl.float64)
            to = out_ptrs[k]
            tl.store(to + col, tl.sum(total, 0).to(to.dtype.element_ty), mask=keep)
        block -= tl.cdiv(length, BLOCK_C)
