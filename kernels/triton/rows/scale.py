"""In-place scaling of a gradient by a factor that only the device knows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def scale_in_place(grad_ptr, factor_ptr, n: tl.int64, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """grad *= factor; returns at once where factor is 1. Few programs walk over any number of elements."""
    factor = tl.load(factor_ptr).to(DTYPE)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            k = first + tl.arange(0, BLOCK)
            keep = k < n
            grad = tl.load(grad_ptr + k, mask=keep, other=0.0).to(DTYPE)
            tl.store(grad_ptr + k, grad * factor, mask=keep)


@triton.jit
def scale_all_in_place(grad_ptrs, lengths, factor_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Every grad *= factor; returns at once where factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for i in tl.static_range(COUNT):
            for first in range(tl.program_id(0).to(tl.int64) * BLOCK, lengths[i], step):
                k = first + tl.arange(0, BLOCK)
                keep = k < lengths[i]
                grad = tl.load(grad_ptrs[i] + k, mask=keep, other=0.0)
                scaled = grad.to(factor.dtype) * factor
                tl.store(grad_ptrs[i] + k, scaled.to(grad.dtype), mask=keep)
