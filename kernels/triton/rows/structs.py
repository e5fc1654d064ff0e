"""The arguments of the row kernels as a few NamedTuples, and what kernels make of them.

What holds in Triton 3.5.1, 3.6.0, 3.7.1, 3.8.0 and 3.9.0 alike (each was tried, by compiling for sm_90):
- An argument may be a NamedTuple of pointers, None and constexprs, also one inside another. None and constexprs in it
  are known at compile time: `if p.mask_ptr is not None`, `tl.zeros([how.ROWS], ...)`.
- It may be built inside a kernel (`Side(p.student, *side(...), None)`) and handed to device functions, but a device
  function returns tensors only, tuples of them included: of a returned None or constexpr older versions make a tensor.
- Of a tuple that is built inside a kernel the fields that are constexprs become tensors or, of a dtype, an error; those
  of an argument tuple inside it stay what they are. So flags come in argument tuples, and FLOAT64 tells the dtype.
- Of a tuple of NamedTuples up to 3.6.0 forgets the names of the fields: `Part(*parts[k])` brings them back.
- `t is None` of a tuple that has None among its fields is an error up to 3.6.0: ask a field.
- A tuple has no `_replace`, and one as a tl.constexpr argument has no fields before 3.9.0.
- Numbers in an argument tuple: a float becomes float32, an integer is specialised on being 1 and on being a multiple
  of 16, do_not_specialize notwithstanding. So run-time numbers and counts stay arguments of their own.
- Pointers in an argument tuple are specialised on their alignment, do_not_specialize_on_alignment notwithstanding. So
  the launcher copies what is small and not aligned (`mfd_fast.backends.triton.launch.aligned`).
"""

from typing import NamedTuple

import triton.language as tl

# Names of numbers whose value must not be compiled in.
NUMBERS = ["n_rows", "n_counts", "ignore_index", "grad_soft_stride", "grad_hard_stride", "n_listed"]
NUMBERS += ["classes", "width", "s_width", "t_width", "s_inner", "s_outer", "s_row", "t_inner", "t_outer", "t_row"]


class Logits(NamedTuple):
    """Logits [N, C] of one side; strides are divided by UNIT, a power of two: so the compiler sees the alignment.

    temperature_ptr: None, or one temperature (STEP 0) or N (STEP 1). FLAT: one stride leads from row to row. SCALED,
    CAPPED, STANDARD: the parts of the transform.
    """

    ptr: tl.tensor
    temperature_ptr: tl.tensor
    UNIT: tl.constexpr
    FLAT: tl.constexpr
    STEP: tl.constexpr
    SCALED: tl.constexpr
    CAPPED: tl.constexpr
    STANDARD: tl.constexpr


class Numbers(NamedTuple):
    """Run-time numbers of one side: temperature (unless there is a pointer), transform, strides over UNIT."""

    temperature: tl.tensor
    scale: tl.tensor
    softcap: tl.tensor
    inner: tl.tensor
    outer: tl.tensor
    row: tl.tensor


class RowProblem(NamedTuple):
    """Student and teacher, what rows count and their labels; of a call with several teachers also the others.

    more_ptrs, more_inner, more_outer, more_row: tuples, an entry per further teacher, or None. weights_ptr: the
    teachers' weights [K] or, with WEIGHTS_PER_ROW, [N, K]; None: equal ones. KEEPS_IGNORED: a row whose label is
    ignored counts, without its hard term.
    """

    student: Logits
    teacher: Logits
    labels_ptr: tl.tensor
    mask_ptr: tl.tensor
    more_ptrs: tl.tuple
    more_inner: tl.tuple
    more_outer: tl.tuple
    more_row: tl.tuple
    weights_ptr: tl.tensor
    WEIGHTS_PER_ROW: tl.constexpr
    KEEPS_IGNORED: tl.constexpr


class How(NamedTuple):
    """What is decided at compile time: divergence and targets, arithmetic, the tile [ROWS, LANES, VEC].

    EXACT: exponentials whose argument is exact beyond float32. FLOAT64: the arithmetic. LOOP: a row is longer than a
    tile. CONTIGUOUS: a lane holds VEC neighbours.
    """

    DIVERGENCE: tl.constexpr
    HARD: tl.constexpr
    SMOOTH: tl.constexpr
    TERMS: tl.constexpr
    SQUARED: tl.constexpr
    EXACT: tl.constexpr
    FLOAT64: tl.constexpr
    CONTIGUOUS: tl.constexpr
    LOOP: tl.constexpr
    ROWS: tl.constexpr
    LANES: tl.constexpr
    VEC: tl.constexpr


class Loss(NamedTuple):
    """The scalar loss: partial sums per program, the student's gradient if it is wanted, and what the terms count for:
    weight per row, weights of the terms, what the sum is divided by (`reduce.divisor`). APART: the hard term is divided
    by a count of its own, which lies behind that of the rows. parts_ptr: None, or partial sums [PARTS, programs] of the
    terms before their weights and of both entropies.
    """

    partial_ptr: tl.tensor
    parts_ptr: tl.tensor
    grad_ptr: tl.tensor
    weight_ptr: tl.tensor
    soft_weight_ptr: tl.tensor
    hard_weight_ptr: tl.tensor
    normalizer_ptr: tl.tensor
    counts_ptr: tl.tensor
    COUNTS: tl.constexpr
    APART: tl.constexpr


class LossNumbers(NamedTuple):
    """The numbers in place of the pointers of `Loss` that are None, and how many counts there are."""

    soft_weight: tl.tensor
    hard_weight: tl.tensor
    normalizer: tl.tensor
    n_counts: tl.tensor


class Place(NamedTuple):
    """The rows of a program, [ROWS]: number, existence, label (0 where there is none to read), whether it is counted,
    whether it has a hard term, and whether it does but its label is out of range. classes: how many.
    """

    row: tl.tensor
    exists: tl.tensor
    label: tl.tensor
    counted: tl.tensor
    labelled: tl.tensor
    bad: tl.tensor
    classes: tl.tensor


class Side(NamedTuple):
    """One side's logits. Per row [ROWS]: start (first element), mean, spread, off, back, T, c = log2(e)/T.

    Standardisation takes off the mean and divides by spread = standard deviation + 1e-7; off is the mean of what comes
    of it, not 0 as the mean that is taken off is rounded; back: the factor of `through_transform`'s drift. parts: None,
    or the teachers (`Part`) whose mixture this side is.
    """

    of: Logits
    ptr: tl.tensor
    start: tl.tensor
    mean: tl.tensor
    spread: tl.tensor
    off: tl.tensor
    back: tl.tensor
    T: tl.tensor
    c: tl.tensor
    scale: tl.tensor
    softcap: tl.tensor
    parts: tl.tuple


class Part(NamedTuple):
    """One of several teachers: where it is and how it is standardised as in `Side`, which has the rest. Per row: the
    maximum, log sum exp((y - max)/T), the same at T = 1 if asked for, and the logarithm of its weight.
    """

    ptr: tl.tensor
    start: tl.tensor
    mean: tl.tensor
    spread: tl.tensor
    off: tl.tensor
    back: tl.tensor
    top: tl.tensor
    log_sum: tl.tensor
    log_sum_at_one: tl.tensor
    log_weight: tl.tensor
