"""Modality dropout: what it drops, what it keeps, what it fills in, and that it reproduces."""

import copy
import pickle

import pytest
import torch
from fusion_modules import OUT, WIDTHS, inputs
from torch._dynamo.testing import CompileCounterWithBackend

import mfd_fast as mfd
from mfd_fast.testing import assert_bitwise_equal


def dropped(module, features, present=None, seed=0):
    return module(features, present, generator=torch.Generator().manual_seed(seed))


def test_dropout_keeps_one_and_is_reproducible():
    features = [torch.ones(4000, 2), torch.ones(4000, 3), torch.ones(4000, 1)]
    module = mfd.nn.ModalityDropout(3, [0.5, 0.2, 1.0])
    out, present = dropped(module, features)
    assert_bitwise_equal(present, dropped(module, features)[1])
    assert not torch.equal(present, dropped(module, features, seed=1)[1])
    assert bool(present.any(-1).all())
    for m, x in enumerate(out):
        assert_bitwise_equal(x, present[:, m, None].expand_as(x).float())
    # Of modality 2 (p = 1) only the third of those rows is left that would have lost everything: 0.5·0.2/3.
    share = present.float().mean(0)
    expected = torch.tensor([0.5 + 0.1 / 3, 0.8 + 0.1 / 3, 0.1 / 3])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.03)


def test_dropout_respects_what_is_absent_already():
    features = [torch.randn(500, 4), torch.randn(500, 4), torch.randn(500, 4)]
    incoming = torch.rand(500, 3) < 0.5
    incoming[0] = False
    features = [torch.where(incoming[:, m, None], x, torch.nan) for m, x in enumerate(features)]
    out, present = dropped(mfd.nn.ModalityDropout(3, 0.9), features, incoming)
    assert not (present & ~incoming).any()
    assert_bitwise_equal(present.any(-1), incoming.any(-1))
    for m, x in enumerate(out):
        assert not x[~present[:, m]].any()
        assert_bitwise_equal(x[present[:, m]], features[m][present[:, m]])


def test_dropout_beside_its_device_is_refused():
    with pytest.raises(ValueError, match=r"ModalityDropout: features\[0\] must be on cpu"):
        mfd.nn.ModalityDropout(2)([torch.ones(3, 2, device="meta"), torch.ones(3, 2, device="meta")])


def test_dropout_zero_and_one():
    features = [torch.randn(50, 2), torch.randn(50, 2)]
    assert bool(mfd.nn.ModalityDropout(2, 0.0)(features).present.all())
    assert_bitwise_equal(mfd.nn.ModalityDropout(2, 1.0)(features).present.sum(-1), torch.ones(50, dtype=torch.int64))
    assert bool(mfd.nn.ModalityDropout(1, 1.0)([features[0]]).present.all())


def test_dropout_in_eval_is_the_identity():
    features = [torch.randn(5, 2), torch.full((5, 3), torch.nan)]
    present = torch.tensor([[True, False]] * 5)
    module = mfd.nn.ModalityDropout(2, 0.5).eval()
    for mask in (None, present):
        out, after = module(features, mask)
        assert all(a is b for a, b in zip(out, features, strict=True))
        assert after is mask
    learned = mfd.nn.ModalityDropout(2, 0.5, fill_features=[2, 3]).eval()
    assert learned(features)[0][1] is features[1]
    with torch.no_grad():
        learned.fills[1].fill_(2.0)
    out, after = learned(features, present)
    assert after is present
    assert_bitwise_equal(out[0], features[0])
    assert_bitwise_equal(out[1].detach(), torch.full((5, 3), 2.0))


def test_learned_fill_learns_from_absent_rows_only():
    module = mfd.nn.ModalityDropout(2, 0.0, fill_features=[2, 3])
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {"fills.0": (2,), "fills.1": (3,)}
    present = torch.tensor([[True, False], [True, True], [True, False]])
    features = [torch.randn(3, 2, requires_grad=True), torch.randn(3, 3, requires_grad=True)]
    out, _ = module(features, present)
    sum(x.sum() for x in out).backward()
    assert_bitwise_equal(module.fills[1].grad, torch.full((3,), 2.0))
    assert not module.fills[0].grad.any()
    assert_bitwise_equal(features[1].grad, present[:, 1:].expand(3, 3).float())


def test_dropout_of_tokens_drops_whole_samples():
    image, text = torch.ones(6, 9, 4), torch.ones(6, 2, 5, 3)
    module = mfd.nn.ModalityDropout(2, 0.5, row_dims=1, fill_features=[4, 3])
    (image, text), present = dropped(module, [image, text])
    assert present.shape == (6, 2)
    assert_bitwise_equal(image.detach(), present[:, 0, None, None].expand(6, 9, 4).float())
    assert_bitwise_equal(text.detach(), present[:, 1, None, None, None].expand(6, 2, 5, 3).float())


def test_dropout_compiles_pickles_and_feeds_the_other_modules():
    torch._dynamo.reset()
    drop = mfd.nn.ModalityDropout(3, 0.5, fill_features=WIDTHS)
    fusion = mfd.nn.ModalFusion(WIDTHS, OUT)

    def step(xs, mask):
        return fusion(*drop(xs, mask))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (9, 8):
        features, incoming = inputs(fusion, rows)
        out = compiled(features, incoming)
        assert not ((out.weights > 0) & ~incoming).any()
        assert_bitwise_equal((out.weights > 0).any(-1), incoming.any(-1))
    assert counter.frame_count == 1
    for twin in (pickle.loads(pickle.dumps(drop)), copy.deepcopy(drop)):
        assert_bitwise_equal(dropped(twin, features)[1], dropped(drop, features)[1])
    assert "p=(0.5, 0.5, 0.5)" in repr(drop)
