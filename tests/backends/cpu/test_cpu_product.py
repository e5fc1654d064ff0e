"""The native products of mfd_loss's head: float32, and bfloat16 with float32 sums."""

from pathlib import Path

import pytest
import torch

from mfd_fast.backends.cpu import gemm, isa
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


def test_a_large_heads_gradient_rounds_no_more_than_eager():
    generator = torch.Generator().manual_seed(0)
    d_logits, pooled = torch.randn(1024, 200, generator=generator), torch.randn(1024, 97, generator=generator)
    assert d_logits.numel() * pooled.shape[1] > gemm.NATIVE_PRODUCTS
    exact = d_logits.double().t() @ pooled.double()
    assert_close_to_float64(gemm.head_gradient(d_logits, pooled), exact, d_logits.t() @ pooled)


def test_onednn_is_for_avx512(monkeypatch):
    """With AVX2 it is slower than MKL, and rounds more than the gate of the benchmarks allows."""
    gemm.onednn.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    try:
        assert gemm.onednn() is None
        x, weight, bias = _operands(300, 400, 200, "dense")
        assert_bitwise_equal(gemm.linear(x, weight, bias), torch.addmm(bias, x, weight.t()))
    finally:
        gemm.onednn.cache_clear()


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


@pytest.mark.parametrize("shape", [(1, 2, 1), (7, 6, 3), (130, 402, 49), (33, 96, 144), (0, 4, 5), (9, 5, 17)])
def test_the_product_of_bfloat16_is_not_rounded_to_bfloat16(shape):
    x, weight, bias = _operands(*shape, "dense")
    x, weight = x.bfloat16(), weight.bfloat16()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    here = isa() == "avx512" and "avx512_bf16" in flags and shape[1] % 2 == 0
    assert gemm.has_pair_product(x, weight) == here
    assert not gemm.has_pair_product(x.repeat(1, 2)[:, ::2], weight) or shape[0] == 0
    for b in (None, bias):
        product = gemm.pair_product(x, weight, b) if here else gemm.linear(x.float(), weight.float(), b, exact=True)
        assert product.dtype is torch.float32
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        eager = torch.nn.functional.linear(x.float(), weight.float(), b)
        assert_close_to_float64(product, exact, eager)
