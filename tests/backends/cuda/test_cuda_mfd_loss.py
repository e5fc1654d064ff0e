"""The single pass of mfd_loss on the CUDA kernels: sizes, options, launches, and when it gives way to the chain."""

import pytest
import torch
from draws import assert_draws_obey_rule
from harness import assert_same, evaluate, on
from op_db import RECORDS
from op_db_divergences import DIVERGENCES
from test_triton_fusion import LEAVES, single_pass_call

import mfd_fast as mfd
from mfd_fast.backends import cuda, plans
from mfd_fast.backends.cuda import mfd_loss as backend

MFD = RECORDS["mfd_loss"]
H100, RTX = (90, 4, 232448), (120, 4, 101376)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def one_pass(monkeypatch):
    """Whether each call so far has been one pass."""
    original, answers = backend.has_one_pass, []

    def noted(problem):
        answers.append(original(problem))
        return answers[-1]

    monkeypatch.setattr(backend, "has_one_pass", noted)
    return answers


def assert_rule(call_of, few):
    without = ("predictions",)  # the argmax of rounded logits
    assert_draws_obey_rule(MFD, "cuda", call_of, few, "mfd_loss", without=without, names=LEAVES)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_several_tiles_with_odd_remainders(one_pass, dtype, kind):
    """Two blocks, two tiles of the width and three of the classes, whose depth several warps share."""
    assert_rule(lambda seed: {**single_pass_call(dtype, seed), "feature_kind": kind}, 2)
    assert set(one_pass) == {True}


@pytest.mark.parametrize(("width", "classes"), [(1, 1), (8, 2), (129, 31), (200, 600), (560, 24)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_mfd_loss_sizes_on_cuda(one_pass, dtype, width, classes):
    """Fewer and more tiles than warps, one of either product; widths that are and are not multiples of a load."""

    def call_of(seed):
        call = single_pass_call(dtype, seed, 5, width, classes)
        return {**call, "teacher_features": call["teacher_features"] + 1.0}

    assert_rule(call_of, 4)
    assert set(one_pass) == {True}


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=str)
def test_every_divergence(one_pass, divergence):
    def call_of(seed):
        call = single_pass_call(FP32, seed, 5, 9, 70)
        return {**call, "divergence": divergence, "labels": call["labels"].clamp(min=0)}

    assert_rule(call_of, 12)
    assert set(one_pass) == {True}


def test_dtypes_may_differ():
    """A head or features of 16 bits beside others: the products are float32."""
    call = single_pass_call(FP32, 0, 5, 9, 7)
    for changed in (
        {"head_weight": call["head_weight"].bfloat16()},
        {"features": [call["features"][0].bfloat16()] * 3},
    ):
        mixed = {**call, **changed, "teacher_logits": call["teacher_logits"].half()}
        found, exact = (evaluate(MFD, on(MFD, b), mixed, names=LEAVES) for b in ("cuda", "reference"))
        assert_same(found, exact, "mixed", rtol=1e-2, atol=1e-5)


def test_stacked_features_and_a_head_of_any_layout():
    call = single_pass_call(FP32, 0, rows=5, width=16, classes=7)
    listed = evaluate(MFD, on(MFD, "cuda"), call, names=LEAVES)
    head = call["head_weight"]
    heads = [head.T.contiguous().T, torch.cat([head.new_zeros(7, 1), head], 1)[:, 1:]]
    for layout in heads:
        moved = {**call, "features": torch.stack(call["features"], 1), "head_weight": layout}
        found = evaluate(MFD, on(MFD, "cuda"), moved, names=LEAVES)
        for m in range(3):
            assert torch.equal(found.grads["features"][:, m], listed.grads[f"features[{m}]"])
        assert torch.equal(found.grads["head_weight"], listed.grads["head_weight"])
        assert torch.equal(found.outputs["loss"], listed.outputs["loss"])


def test_sums_over_many_blocks():
    """More blocks than one group: two stages of partial sums."""
    call = single_pass_call(FP32, 0, rows=16 * 17 + 3, width=8, classes=5)
    found, again, exact = (evaluate(MFD, on(MFD, b), call, names=LEAVES) for b in ("cuda", "cuda", "reference"))
    assert_same(found, exact, "many rows", rtol=1e-4, atol=1e-6)
    assert_same(again, found, "again")


@pytest.mark.parametrize("needs", [(), ("head_bias",), ("head_weight",), ("bias",), ("features",), ("query",)], ids=str)
def test_each_gradient_alone(needs):
    call = {**single_pass_call(FP32, 0, rows=5, width=9, classes=7), "pool_weight": 0.2}
    call["teacher_pool_weights"] = torch.where(call["present"], 1.0, 0) / call["present"].sum(-1, keepdim=True)
    everything = evaluate(MFD, on(MFD, "cuda"), call, names=LEAVES)
    alone = evaluate(MFD, on(MFD, "cuda"), call, names=needs)
    assert torch.equal(alone.outputs["loss"], everything.outputs["loss"])
    for name, gradient in alone.grads.items():
        assert torch.equal(gradient, everything.grads[name]), name


def launches(call, *, gradient):
    call = {k: v.clone() if torch.is_tensor(v) else v for k, v in call.items()}
    call["query"].requires_grad_(gradient)
    call["head_weight"].requires_grad_(gradient)
    before = cuda.native().launches()
    loss = mfd.mfd_loss(**call, backend="cuda").loss
    forward = cuda.native().launches()
    if gradient:
        loss.backward()
    return forward - before, cuda.native().launches() - forward


def test_one_launch_for_the_loss_and_all_row_gradients():
    call = single_pass_call(BF16, 0, rows=300, width=8, classes=5)
    assert launches(call, gradient=False) == (1, 0)
    assert launches(call, gradient=True)[0] == 1
    assert launches({**call, "reduction": "none"}, gradient=False)[0] > 1


@pytest.mark.parametrize(
    ("device", "width", "classes", "dtype", "expected"),
    [
        (H100, 768, 1000, BF16, True),
        (H100, 768, 2048, BF16, True),
        (H100, 1024, 32000, BF16, False),
        ((80, 4, 166912), 768, 1600, BF16, True),
        (RTX, 512, 900, FP32, True),
        (RTX, 768, 1000, BF16, False),
        (H100, 8, 5, torch.float64, False),
    ],
    ids=str,
)
def test_shape_and_device_choose_one_pass(one_pass, device, width, classes, dtype, expected):
    plans.forget()  # another device has taken the place of theirs
    cuda.native().set_device(*device)
    try:
        features = [torch.zeros(1, width, dtype=dtype)]
        head, teacher = torch.zeros(classes, width, dtype=dtype), torch.zeros(1, classes, dtype=dtype)
        mfd.mfd_loss(features, None, head, None, teacher, backend="cuda")
    finally:
        cuda.native().set_device(*H100)
    assert one_pass == [expected]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_chain_gives_the_same_numbers(one_pass, dtype):
    """Where the logits of a block do not fit: pool, library product, rows, library products."""
    call = single_pass_call(dtype, 0, 5, 24, 70)
    whole = evaluate(MFD, on(MFD, "cuda"), call, names=LEAVES)
    cuda.native().set_device(80, 4, 14000)
    try:
        chain = evaluate(MFD, on(MFD, "cuda"), call, names=LEAVES)
    finally:
        cuda.native().set_device(*H100)
    assert one_pass == [True, False]
    room = 2e-2 if dtype == BF16 else 1e-5
    assert_same(chain, whole, "chain", rtol=room, atol=room / 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_are_those_of_argmax_on_cuda(value):
    """The first of equal logits; NaN before any number, as torch.argmax has it."""
    call = single_pass_call(FP32, 1, rows=4, width=6, classes=40)
    call["head_weight"][30] = call["head_weight"][5] * 1.0
    call["head_bias"][[5, 30]] = 50.0
    call["head_bias"][20] = value
    found, expected = (evaluate(MFD, on(MFD, b), call, names=()).outputs["predictions"] for b in ("cuda", "reference"))
    assert torch.equal(found, expected)
