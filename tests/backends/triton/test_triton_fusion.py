"""The Triton fusion kernels where rows need several tiles: the public ops at sizes that interpretation can afford."""

import pytest
import torch
from draws import assert_draws_obey_rule
from harness import assert_same, evaluate, on
from op_db import RECORDS
from op_db_divergences import DIVERGENCES

from mfd_fast.backends.triton import feature_loss, mfd_loss, modal_pool
from mfd_fast.testing import distill_inputs, modal_inputs

POOL, FEATURE, MFD = (RECORDS[name] for name in ("modal_pool", "feature_loss", "mfd_loss"))
LEAVES = ("features", "query", "bias", "head_weight", "head_bias")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def assert_rule(record, call_of, few, names=None):
    assert_draws_obey_rule(record, "triton", call_of, few, record.name, names=names)


@pytest.mark.parametrize("name", POOL.samples())
def test_pool_rows_that_are_read_twice(monkeypatch, name):
    blocks = modal_pool.PoolBlocks(rows=2, width=16, loop=True, warps=4)
    monkeypatch.setattr(modal_pool, "pool_blocks", lambda *_: blocks)
    assert_rule(POOL, lambda seed: POOL.samples(rows=5, classes=37, seed=seed)[name], 3)


def test_pool_programs_that_walk_over_many_rows(monkeypatch):
    monkeypatch.setattr(modal_pool, "MAX_PROGRAMS", 2)
    call = POOL.samples(rows=101, classes=5)["everything"]
    found = evaluate(POOL, on(POOL, "triton"), call)
    assert_same(found, evaluate(POOL, on(POOL, "reference"), call), "walk", rtol=1e-4, atol=4e-6)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("names", [("student",), FEATURE.differentiable], ids=["one pass", "both sides"])
def test_taps_that_are_read_by_tiles(monkeypatch, kind, names):
    monkeypatch.setattr(feature_loss, "MAX_HELD", 8)
    monkeypatch.setattr(feature_loss, "TILE", 8)
    assert_rule(FEATURE, lambda seed: {**FEATURE.samples(classes=37, seed=seed)["taps"], "kind": kind}, 2, names)


def test_masked_rows_are_counted_by_a_kernel_or_beforehand(monkeypatch):
    call = FEATURE.samples()["mse"]
    first = evaluate(FEATURE, on(FEATURE, "triton"), call, names=("student",))
    monkeypatch.setattr(feature_loss, "COUNT_ROWS", 0)
    assert_same(evaluate(FEATURE, on(FEATURE, "triton"), call, names=("student",)), first, "count")


def single_pass_call(dtype, seed, rows=18, width=90, classes=150):
    """Two programs, two tiles of the width and of the classes, a row count that is no multiple of a tile."""
    features, query, bias, present = modal_inputs(rows, 3, width, dtype=dtype, seed=seed)
    present[:, 0] = True
    logits = distill_inputs((rows, classes), dtype=dtype, spread=1.0, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    labels = logits.labels.clone()
    labels[3] = -100
    return {
        "features": features,
        "query": query,
        "bias": bias,
        "present": present,
        "head_weight": (0.2 * torch.randn(classes, width, generator=rng)).to(dtype),
        "head_bias": torch.randn(classes, generator=rng).to(dtype),
        "teacher_logits": logits.teacher,
        "teacher_features": torch.randn(rows, width, generator=rng).to(dtype),
        "labels": labels,
        "temperature": 2.0,
        "hard_weight": 0.4,
        "feature_weight": 0.3,
        "weight": 0.5 + torch.rand(rows, generator=rng),
    }


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_single_pass_over_several_tiles(monkeypatch, dtype, kind):
    original, answers = mfd_loss.has_one_pass, []

    def noted(problem):
        answers.append(original(problem))
        return answers[-1]

    monkeypatch.setattr(mfd_loss, "has_one_pass", noted)
    assert_rule(MFD, lambda seed: {**single_pass_call(DTYPES[dtype], seed), "feature_kind": kind}, 2, LEAVES)
    assert set(answers) == {True}


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=str)
def test_single_pass_has_every_divergence(divergence):
    def call_of(seed):
        call = single_pass_call(torch.float32, seed, 5, 9, 70)
        return {**call, "divergence": divergence, "labels": call["labels"].clamp(min=0)}

    assert_rule(MFD, call_of, 2, LEAVES)


def test_single_pass_of_stacked_features_and_strided_head():
    call = single_pass_call(torch.float32, 0, rows=5, width=9, classes=7)
    listed = evaluate(MFD, on(MFD, "triton"), call, names=LEAVES)
    call["features"] = torch.stack(call["features"], 1)
    call["head_weight"] = call["head_weight"].T.contiguous().T
    found = evaluate(MFD, on(MFD, "triton"), call, names=LEAVES)
    for m in range(3):
        torch.testing.assert_close(found.grads["features"][:, m], listed.grads[f"features[{m}]"], rtol=0, atol=0)
    torch.testing.assert_close(found.grads["head_weight"], listed.grads["head_weight"])
    torch.testing.assert_close(found.outputs["loss"], listed.outputs["loss"], rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_are_those_of_argmax_on_triton(value):
    """The first of equal logits; NaN before any number, as torch.argmax has it."""
    call = single_pass_call(torch.float32, 1, rows=4, width=6, classes=40)
    call["head_weight"][30] = call["head_weight"][5] * 1.0
    call["head_bias"][[5, 30]] = 50.0
    call["head_bias"][20] = value
    found, expected = (
        evaluate(MFD, on(MFD, b), call, names=()).outputs["predictions"] for b in ("triton", "reference")
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("op", ["modal_pool", "mfd_loss"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_leave_no_buffer_unwritten(op, dtype):
    record = RECORDS[op]
    for arguments in record.samples(dtype=DTYPES[dtype], rows=0).values():
        found = evaluate(record, on(record, "triton"), arguments)  # which poisons every allocation
        assert not any(bool(grad.any()) for grad in found.grads.values())
