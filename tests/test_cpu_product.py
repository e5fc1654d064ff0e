"""The native float32 product of mfd_loss's head."""

import pytest
import torch

from mfd_fast.backends.cpu import gemm
from mfd_fast.testing import assert_bitwise_equal, assert_close_to_float64

SHAPES = [(1, 1, 1), (7, 5, 3), (9, 200, 17), (130, 97, 49), (33, 96, 48), (0, 4, 5)]


def _operands(rows, depth, columns, layout):
    generator = torch.Generator().manual_seed(rows + depth)
    x = torch.randn(rows, depth, generator=generator)
    weight = torch.randn(columns, depth, generator=generator)
    if layout == "transposed":
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    elif layout == "strided":
        x, weight = x.repeat(1, 2)[:, ::2], weight.repeat(1, 2)[:, ::2]
    return x, weight, torch.randn(columns, generator=generator)


@pytest.mark.parametrize("layout", ["dense", "transposed", "strided"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounds_no_more_than_eager(shape, layout):
    x, weight, bias = _operands(*shape, layout)
    for b in (None, bias):
        product = gemm.linear(x, weight, b, exact=True)
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        assert product.is_contiguous()
        assert_close_to_float64(product, exact, torch.nn.functional.linear(x, weight, b))


def test_is_the_same_for_any_number_of_threads():
    x, weight, bias = _operands(300, 210, 150, "dense")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gemm.linear(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_bitwise_equal(other, results[0])
