"""In-place scaling of a gradient by a factor that only the device knows."""

import triton
import triton.language as tl


@triton.jit
def scale_blocks(ptr, n, factor, BLOCK: tl.constexpr):
    """ptr[:n] *= factor; few programs walk over any number of elements. Without a mask the whole blocks are accessed
    16 bytes at a time; the last program has the rest.
    """
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    whole = n // BLOCK * BLOCK
    for first in range(pid * BLOCK, whole, programs * BLOCK):
        at = ptr + first + k
        tl.store(at, (tl.load(at).to(factor.dtype) * factor).to(ptr.dtype.element_ty))
    if (pid == programs - 1) & (whole < n):
        at, keep = ptr + whole + k, whole + k < n
        tl.store(at, (tl.load(at, mask=keep, other=0.0).to(factor.dtype) * factor).to(ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["n"])
def scale_in_place(grad_ptr, factor_ptr, n: tl.int64, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """grad *= factor; returns at once where factor is 1."""
    factor = tl.load(factor_ptr).to(DTYPE)
    if factor != 1.0:
        scale_blocks(grad_ptr, n, factor, BLOCK)


@triton.jit
def scale_all_in_place(grad_ptrs, lengths, factor_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Every grad *= factor; returns at once where factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        for i in tl.static_range(COUNT):
            scale_blocks(grad_ptrs[i], lengths[i], factor, BLOCK)
