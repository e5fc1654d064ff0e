"""Sums over rows in two stages and a fixed order, and what they are divided by."""

import triton
import triton.language as tl


@triton.jit
def divisor(loss, normalizer, n_counts, HARD: tl.constexpr, DTYPE: tl.constexpr):
    """[1]: what the sum over rows is divided by: the counted rows (at least 1; HARD: those with a label), a 0-d tensor
    or a number.
    """
    if loss.counts_ptr is not None:
        k = tl.arange(0, loss.COUNTS)
        first = n_counts if HARD else 0
        counted = tl.sum(tl.load(loss.counts_ptr + first + k, mask=k < n_counts, other=0), 0)
        return tl.full([1], tl.maximum(counted, 1), DTYPE)
    elif loss.normalizer_ptr is not None:
        return tl.full([1], tl.load(loss.normalizer_ptr), DTYPE)
    else:
        return tl.full([1], normalizer, DTYPE)


@triton.jit
def counted_rows(labels_ptr, mask_ptr, n_rows, ignore_index, BLOCK: tl.constexpr):
    """How many of all rows are counted, at least 1: what a program that needs it works out for itself."""
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        exists = row < n_rows
        counted = exists
        if mask_ptr is not None:
            counted = counted & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)
        if labels_ptr is not None:
            counted = counted & (tl.load(labels_ptr + row, mask=exists, other=0) != ignore_index)
        total += counted.to(tl.int32)
    return tl.maximum(tl.sum(total, 0), 1)


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def count_rows(
    labels_ptr,
    mask_ptr,
    counts_ptr,
    n_rows: tl.int64,
    ignore_index: tl.int64,
    KEEPS_IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[program] = counted rows among every num_programs-th block of rows; with KEEPS_IGNORED those that have a
    label follow after the last program's.
    """
    pid = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int32)
    of_labels = total
    for first in range(pid * BLOCK, n_rows, tl.num_programs(0).to(tl.int64) * BLOCK):
        row = first + tl.arange(0, BLOCK)
        exists = row < n_rows
        counted = exists
        if mask_ptr is not None:
            counted = counted & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)
        labelled = counted
        if labels_ptr is not None:
            labelled = counted & (tl.load(labels_ptr + row, mask=exists, other=0) != ignore_index)
        if not KEEPS_IGNORED:
            counted = labelled
        total += counted.to(tl.int32)
        of_labels += labelled.to(tl.int32)
    tl.store(counts_ptr + pid, tl.sum(total.to(tl.int64), 0))
    if KEEPS_IGNORED:
        tl.store(counts_ptr + tl.num_programs(0) + pid, tl.sum(of_labels.to(tl.int64), 0))


PARTS = tl.constexpr(4)  # of a loss: soft, hard, student's and teacher's entropy


@triton.jit(do_not_specialize=["n_partials", "n_counts"])
def reduce_loss(
    out_ptr,
    parts_ptr,
    loss,
    normalizer: tl.float64,
    n_partials: tl.int64,
    n_counts: tl.int64,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the partial losses of ``loss`` (`Loss`), in a fixed order, over its divisor; the same of its parts."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n_partials, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total += tl.load(loss.partial_ptr + k, mask=k < n_partials, other=0.0).to(tl.float64)
    by = divisor(loss, normalizer, n_counts, False, tl.float64)
    tl.store(out_ptr + tl.arange(0, 1), (tl.sum(total, 0) / by).to(DTYPE))
    if parts_ptr is not None:
        of_hard = by
        if loss.APART:
            of_hard = divisor(loss, normalizer, n_counts, True, tl.float64)
        for part in tl.static_range(PARTS):
            total = tl.zeros([BLOCK], tl.float64)
            for first in range(0, n_partials, BLOCK):
                k = first + tl.arange(0, BLOCK)
                total += tl.load(loss.parts_ptr + part * n_partials + k, mask=k < n_partials, other=0.0)
            total = tl.sum(total, 0) / (of_hard if part == 1 else by)
            tl.store(parts_ptr + part + tl.arange(0, 1), total.to(DTYPE))
