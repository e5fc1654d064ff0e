"""The tolerance rule must fail when it should: each test plants one fault."""

import math

import pytest
import torch

from mfd_fast.testing import assert_bitwise_equal, assert_close_to_float64, ulp


def exact_values(n=64, seed=0):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_result_passes_even_where_eager_is_exact(dtype):
    exact = exact_values()
    report = assert_close_to_float64(exact.to(dtype), exact, exact.to(dtype))
    assert report.max_error == report.eager_max_error > 0
    representable = exact.to(dtype).double()
    report = assert_close_to_float64(exact.to(dtype), representable, exact.to(dtype))
    assert report.max_error == 0


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 2)])
def test_maximum_error_is_bounded_on_both_sides(dtype, factor):
    exact = torch.full((16,), 1.0, dtype=torch.float64)
    step = torch.finfo(dtype).eps
    eager = exact.to(dtype)
    eager[3] += 8 * step
    allowed = exact.to(dtype)
    allowed[5] += 8 * factor * step + step
    if dtype != torch.float32:
        assert_close_to_float64(allowed, exact, eager)
    beyond = allowed.clone()
    beyond[5] += step
    with pytest.raises(AssertionError, match=r"1 of 16 elements beyond .*worst at \[5\]"):
        assert_close_to_float64(beyond, exact, eager)


def test_float32_root_mean_square_is_bounded():
    """Twice eager's root mean square, with the same maximum."""
    rng = torch.Generator().manual_seed(0)
    exact = torch.ones(4000, dtype=torch.float64)
    noise = torch.randn(4000, generator=rng, dtype=torch.float64).clamp(-3, 3)
    other = torch.randn(4000, generator=rng, dtype=torch.float64).clamp(-3, 3)
    step = 20 * torch.finfo(torch.float32).eps
    eager = (exact + step * noise).float()
    assert_close_to_float64((exact + step * other).float(), exact, eager)
    with pytest.raises(AssertionError, match="root mean square"):
        assert_close_to_float64((exact + 1.2 * step * other).float(), exact, eager)
    assert_close_to_float64((exact + 1.2 * step * other).float()[:30], exact[:30], eager[:30])  # no evidence yet


def test_a_lone_float32_outlier_is_bounded_by_the_maximum_alone():
    exact = torch.ones(16, dtype=torch.float64)
    step = torch.finfo(torch.float32).eps
    eager, actual = exact.float(), exact.float()
    eager[0] += 8 * step
    actual[1] += 16 * step
    assert_close_to_float64(actual, exact, eager)
    actual[1] += 2 * step
    with pytest.raises(AssertionError, match="beyond"):
        assert_close_to_float64(actual, exact, eager)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["actual", "reference"])
def test_special_values_must_match(value, side):
    exact = exact_values()
    actual, eager = exact.float(), exact.float()
    (actual if side == "actual" else exact)[7] = value
    with pytest.raises(AssertionError, match=r"in the wrong place at 1 of 64 elements, first at \[7\]"):
        assert_close_to_float64(actual, exact, eager)


def test_special_values_in_place_pass_and_give_no_cover():
    exact = exact_values()
    exact[0], exact[1], exact[2] = math.nan, math.inf, -math.inf
    actual, eager = exact.float(), exact.float()
    assert_close_to_float64(actual, exact, eager)
    actual[5] *= 1.1
    with pytest.raises(AssertionError, match="beyond"):
        assert_close_to_float64(actual, exact, eager)
    eager[9] = math.nan  # a failing eager is no licence
    with pytest.raises(AssertionError, match="beyond"):
        assert_close_to_float64(actual, exact, eager)


def test_opposite_infinity_fails():
    exact = torch.tensor([math.inf], dtype=torch.float64)
    with pytest.raises(AssertionError, match="wrong place"):
        assert_close_to_float64(-exact.float(), exact, exact.float())


def test_overflow_of_the_result_dtype_is_right():
    exact = torch.tensor([1e6, 2.0], dtype=torch.float64)
    assert_close_to_float64(exact.half(), exact, exact.half())


@pytest.mark.parametrize(
    "actual",
    [
        torch.zeros(3),
        torch.zeros(4, 1),
        torch.zeros(4, dtype=torch.float16),
        torch.zeros(4, dtype=torch.float64),
    ],
)
def test_shape_and_dtype_must_match(actual):
    exact = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"shape|dtype"):
        assert_close_to_float64(actual, exact, exact.float())


def test_wrong_use_is_a_type_error():
    exact = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(TypeError, match="must be float64"):
        assert_close_to_float64(exact.float(), exact.float(), exact.float())
    with pytest.raises(TypeError, match="gradcheck"):
        assert_close_to_float64(exact, exact, exact)
    with pytest.raises(TypeError, match="floating"):
        assert_close_to_float64(exact.long(), exact, exact.float())


def test_empty_results_compare():
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert assert_close_to_float64(empty.float(), empty, empty.float()).max_error == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ulp_is_the_distance_to_the_next_value(dtype):
    x = torch.tensor([1.0, 1.5, 2.0, -3.0, 1e-3, 1e4, 0.0]).to(dtype)
    ahead = torch.nextafter(x.abs(), torch.tensor(math.inf, dtype=dtype))
    torch.testing.assert_close(ulp(x, dtype), ahead.double() - x.abs().double(), rtol=0, atol=0)


def test_bitwise_equality_sees_every_bit():
    x = torch.tensor([0.0, 1.0, math.nan])
    assert_bitwise_equal(x, x.clone())
    assert_bitwise_equal(x.expand(2, 3), x.repeat(2, 1))
    for other in (
        torch.tensor([-0.0, 1.0, math.nan]),
        torch.tensor([0.0, 1.0 + 2**-23, math.nan]),
        torch.tensor([0.0, 1.0, -math.nan]),
    ):
        with pytest.raises(AssertionError, match="1 of 3 elements differ"):
            assert_bitwise_equal(other, x)
    for other in (x[:2], x.double(), x[None]):
        with pytest.raises(AssertionError, match="expected"):
            assert_bitwise_equal(other, x)
    assert_bitwise_equal(torch.tensor([True]), torch.tensor([True]))
