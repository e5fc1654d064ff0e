"""The sample generators and layouts are what they say."""

import pytest
import torch

from mfd_fast.testing import DISTANCES, LAYOUTS, distill_inputs, modal_inputs
from mfd_fast.testing.tolerance import assert_bitwise_equal

REPEATING = ("expanded", "stride_zero")


@pytest.mark.parametrize("distance", DISTANCES)
def test_seed_decides_every_bit(distance):
    first, again, other = (distill_inputs((4, 7), distance=distance, seed=s) for s in (3, 3, 4))
    for a, b, c in zip(vars(first).values(), vars(again).values(), vars(other).values(), strict=True):
        assert_bitwise_equal(a, b)
        assert not torch.equal(a, c)


def test_distances_are_ordered():
    gap = {}
    for distance in DISTANCES:
        sample = distill_inputs((64, 32), distance=distance)
        gap[distance] = float((sample.student - sample.teacher).std())
    assert gap["far"] > 10 * gap["near"] > 100 * gap["almost"] > 0


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (7,), (0, 5), (3, 0), (1, 1)])
def test_shapes_dtypes_and_label_range(shape):
    sample = distill_inputs(shape, dtype=torch.bfloat16, teacher_dtype=torch.float32)
    assert sample.student.shape == sample.teacher.shape == shape
    assert (sample.student.dtype, sample.teacher.dtype) == (torch.bfloat16, torch.float32)
    assert sample.labels.shape == shape[:-1]
    if sample.labels.numel() and shape[-1]:
        assert 0 <= int(sample.labels.min()) <= int(sample.labels.max()) < shape[-1]


def test_modal_inputs_have_absent_and_present():
    features, query, bias, present = modal_inputs(16, 3, 5)
    assert len(features) == 3
    assert features[0].shape == (16, 5)
    assert query.shape == (5,)
    assert bias.shape == (3,)
    assert present.dtype == torch.bool
    assert 0 < int(present.sum()) < present.numel()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,), (), (0, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_layouts_keep_shape_dtype_and_values(name, shape, dtype):
    x = (10 * torch.randn(shape)).to(dtype)
    y = LAYOUTS[name](x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    if name not in REPEATING:
        assert_bitwise_equal(y, x)


def test_layouts_are_what_they_are_named():
    x = torch.randn(3, 4, 8)
    made = {name: f(x) for name, f in LAYOUTS.items()}
    assert made["contiguous"].is_contiguous()
    assert made["transposed"].stride(-1) == 12
    assert made["padded"].stride() == (52, 13, 1)
    assert made["shifted"].stride() == (40, 8, 1)
    assert made["every_other"].stride(-1) == 2
    assert made["misaligned"].storage_offset() == 1
    assert made["misaligned"].is_contiguous()
    assert made["expanded"].stride() == (0, 0, 1)
    assert made["stride_zero"].stride() == (0, 0, 0)
    assert torch.equal(made["expanded"], x[0, 0].expand_as(x))
    assert torch.equal(made["stride_zero"], x[0, 0, 0].expand_as(x))
    assert made["padded"].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["padded", "shifted", "every_other", "misaligned"])
def test_unused_elements_are_nan(name):
    y = LAYOUTS[name](torch.zeros(3, 4))
    whole = torch.empty(0).set_(y.untyped_storage())
    assert int((whole == 0).sum()) == 12
    assert int(whole.isnan().sum()) == whole.numel() - 12 > 0
