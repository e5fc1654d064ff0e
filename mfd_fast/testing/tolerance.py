"""The tolerance rule: errors are measured against float64 and bounded by eager PyTorch's on the same inputs.

With ``e = |actual - exact|``, ``E = |eager - exact|`` and one ulp at the exact value, in the result's dtype:

=================  ======================================================================
inputs             rule
=================  ======================================================================
float16, bfloat16  every ``e[i] <= 1 * max(E) + ulp[i]``
float32            every ``e[i] <= 2 * max(E) + ulp[i]``  and  ``rms(e) <= 1 * rms(E) + rms(ulp)``
float64            gradcheck, not this rule
=================  ======================================================================

The root mean squares are those of a sample, so the last bound is judged as such: ``mean(e²)`` may exceed
``mean(E²)`` by three standard errors of their paired difference, which vanish as the sample grows.
The ulp makes the rule fair where eager is exact by luck (its error is 0): no result can be asked to be better
than the spacing of its own dtype. NaN and each sign of infinity must sit exactly where the exact result, rounded
to the result's dtype, has them. Where eager is not finite but the exact result is, eager earns no credit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ErrorReport:
    """Errors against float64 of one comparison, over the elements where the exact result is finite."""

    max_error: float
    eager_max_error: float
    rms_error: float
    eager_rms_error: float


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of ``dtype`` at each of ``values``, in float64 (the smallest subnormal at and around 0).

    Args:
        values: any shape, finite.
        dtype: a floating dtype.
    """
    info = torch.finfo(dtype)
    magnitude = values.detach().to(torch.float64).abs().clamp(min=info.tiny)
    # frexp gives magnitude = m * 2**e with m in [0.5, 1), so the leading bit is 2**(e - 1).
    _, exponent = torch.frexp(magnitude)
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent - 1)


def _require_same_form(actual: Tensor, reference64: Tensor, eager: Tensor, name: str) -> None:
    if reference64.dtype != torch.float64:
        raise TypeError(f"{name}: the reference must be float64, got {reference64.dtype}")
    if not actual.dtype.is_floating_point or not eager.dtype.is_floating_point:
        raise TypeError(f"{name}: floating results only, got {actual.dtype} and eager {eager.dtype}")
    if eager.dtype == torch.float64:
        raise TypeError(f"{name}: float64 results are tested by gradcheck, not by this rule")
    if actual.dtype not in (eager.dtype, torch.float32):
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {eager.dtype} (or float32 for a loss)")
    for other, who in ((reference64, "reference"), (eager, "eager")):
        if actual.shape != other.shape:
            raise AssertionError(f"{name}: shape {tuple(actual.shape)}, {who} has {tuple(other.shape)}")


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _standard_error(x: Tensor) -> float:
    """Of the mean of ``x``; 0 where one value says nothing about it."""
    return float(x.std() / x.numel() ** 0.5) if x.numel() > 1 else 0.0


def _max(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def assert_close_to_float64(
    actual: Tensor, reference64: Tensor, eager_same_dtype: Tensor, name: str = "result"
) -> ErrorReport:
    """Assert that ``actual`` obeys the tolerance rule of this module.

    Args:
        actual: the result under test; its dtype is eager's, or float32 (a loss of 16-bit inputs).
        reference64: the exact result, float64, same shape.
        eager_same_dtype: what plain PyTorch computes in the dtype of the inputs, same shape.
        name: what is compared, for the message.

    Returns:
        The errors, for reports.

    Raises:
        AssertionError: shape, dtype, NaN or infinity differ, or the error passes the bound.
        TypeError: the arguments cannot be compared by this rule.

    Example:
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64) / 3
        >>> report = assert_close_to_float64(exact.float(), exact, torch.tensor([1.0, 2.0]) / 3)
        >>> report.max_error < 1e-7
        True
    """
    _require_same_form(actual, reference64, eager_same_dtype, name)
    actual, reference64, eager = actual.detach(), reference64.detach(), eager_same_dtype.detach()
    rounded = reference64.to(actual.dtype)
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(actual) != test(rounded)
        if bool(wrong.any()):
            where = wrong.nonzero()[0].tolist()
            value = actual[tuple(where)].item()
            raise AssertionError(
                f"{name}: {kind} in the wrong place at {int(wrong.sum())} of {wrong.numel()} elements, "
                f"first at {where}: got {value}, exact {reference64[tuple(where)].item()}"
            )

    finite = torch.isfinite(rounded)
    exact = reference64[finite]
    error = (actual[finite].double() - exact).abs()
    eager_finite = finite & torch.isfinite(eager)
    eager_error = (eager[eager_finite].double() - reference64[eager_finite]).abs()
    spacing = ulp(exact, actual.dtype)
    report = ErrorReport(_max(error), _max(eager_error), _rms(error), _rms(eager_error))

    factor = 1.0 if eager.dtype in _SIXTEEN_BIT else 2.0
    bound = factor * report.eager_max_error + spacing
    # Written as "not <=" so that a NaN anywhere fails.
    beyond = ~(error <= bound)
    if bool(beyond.any()):
        index = int(torch.where(beyond, error - bound, torch.full_like(error, -torch.inf)).argmax())
        where = finite.nonzero()[index].tolist()
        raise AssertionError(
            f"{name}: {int(beyond.sum())} of {error.numel()} elements beyond {factor:g}x eager's maximum "
            f"error {report.eager_max_error:.3e} + 1 ulp, worst at {where}: got {actual[tuple(where)].item()!r}, "
            f"exact {exact[index].item()!r}, error {error[index].item():.3e} > {bound[index].item():.3e}"
        )
    if eager.dtype == torch.float32:
        sampling = _standard_error(
            (actual[eager_finite].double() - reference64[eager_finite]).square() - eager_error.square()
        )
        rms_bound = (report.eager_rms_error**2 + 3 * sampling) ** 0.5 + _rms(spacing)
        if not report.rms_error <= rms_bound:
            raise AssertionError(
                f"{name}: root mean square error {report.rms_error:.3e} > {rms_bound:.3e} (eager "
                f"{report.eager_rms_error:.3e}, one ulp {_rms(spacing):.3e})"
            )
    return report


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Assert equal shape, dtype and bits: NaN equals the same NaN, +0 differs from -0. Strides may differ.

    Raises:
        AssertionError: with the number of differing elements and the first of them.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{name}: {tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
        )
    bits = _BITS[actual.element_size()]
    left = actual.detach().contiguous().view(bits)
    right = expected.detach().contiguous().view(bits)
    differs = left != right
    if bool(differs.any()):
        where = differs.nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ in their bits, first at "
            f"{where}: {actual[tuple(where)].item()!r} != {expected[tuple(where)].item()!r}"
        )
