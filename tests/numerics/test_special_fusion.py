"""Special values of modal_pool, feature_loss and mfd_loss."""

import math

import pytest
import torch
from harness import evaluate, on
from op_db import RECORDS

import mfd_fast as mfd
from mfd_fast.testing import assert_bitwise_equal, modal_inputs

POOL, FEATURE, MFD = (RECORDS[name] for name in ("modal_pool", "feature_loss", "mfd_loss"))
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("backend", POOL.backends)
@pytest.mark.parametrize("mode", ["query", "scores", "bias"])
def test_no_modality_present(backend, mode):
    features, query, bias, _ = modal_inputs(3, 2, 5)
    present = torch.tensor([[True, True], [False, False], [True, False]])
    extra = {"query": {"query": query}, "scores": {"scores": torch.randn(3, 2)}, "bias": {"bias": bias}}[mode]
    found = evaluate(POOL, on(POOL, backend), {"features": features, "present": present, **extra})
    assert not bool(found.outputs["pooled"][1].any())
    assert not bool(found.outputs["weights"][1].any())
    assert found.outputs["weights"][2].tolist() == [1.0, 0.0]
    for name, grad in found.grads.items():
        assert bool(grad.isfinite().all()), name
        if grad.shape[0] == 3:
            assert not bool(grad[1].any()), name


@pytest.mark.parametrize("backend", POOL.backends)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("mode", ["query", "scores", "bias"])
def test_absent_modality_has_no_effect(backend, value, mode):
    features, query, bias, _ = modal_inputs(3, 2, 5)
    present = torch.tensor([[True, True], [False, True], [False, False]])
    scores = torch.randn(3, 2)
    dirty = [f.clone() for f in features]
    dirty[0][1] = dirty[0][2] = dirty[1][2] = value
    dirty_scores = torch.where(present, scores, value)
    extra = {
        "query": [{"query": query, "bias": bias}] * 2,
        "scores": [{"scores": scores}, {"scores": dirty_scores}],
        "bias": [{"bias": bias}] * 2,
    }[mode]
    clean, found = (
        evaluate(POOL, on(POOL, backend), {"features": f, "present": present, **e})
        for f, e in zip((features, dirty), extra, strict=True)
    )
    for (name, a), (_, b) in zip(found.items(), clean.items(), strict=True):
        assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize("backend", MFD.backends)
def test_an_absent_modality_weighs_nothing_in_a_row_of_nan(backend):
    features, query, _, _ = modal_inputs(1, 3, 5)
    features[1][0, 0] = math.nan
    present = torch.tensor([[True, True, False]])
    head, logits = torch.ones(2, 5), torch.zeros(1, 2)
    pool = mfd.modal_pool(features, query, present=present, backend=backend)
    whole = mfd.mfd_loss(features, query, head, None, logits, present=present, backend=backend)
    for weights in (pool.weights, whole.weights):
        assert weights[0, :2].isnan().any()
        assert weights[0, 2].item() == 0.0


@pytest.mark.parametrize("backend", POOL.backends)
def test_nan_in_a_present_modality_surfaces_in_its_row_only(backend):
    features, query, _, _ = modal_inputs(3, 2, 5)
    features[1][1, 0] = math.nan
    pooled, weights = mfd.modal_pool(features, query, backend=backend)
    assert pooled.isnan().any(-1).tolist() == weights.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", POOL.backends)
def test_one_modality_and_large_scores(backend):
    features, query, _, _ = modal_inputs(3, 1, 5)
    pooled, weights = mfd.modal_pool(features, query, backend=backend)
    assert_bitwise_equal(pooled, features[0])
    assert bool((weights == 1).all())
    features, _, _, _ = modal_inputs(3, 2, 5)
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]])
    _, weights = mfd.modal_pool(features, scores=scores, temperature=1e-3, backend=backend)
    assert weights.tolist() == [[1, 0], [0, 1], [0.5, 0.5]]


@pytest.mark.parametrize("backend", FEATURE.backends)
@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", BAD)
def test_feature_loss_masks(backend, kind, reduction, value):
    s, t = torch.randn(2, 4, 5)
    mask = torch.tensor([True, False, True, True])
    options = {"mask": mask, "kind": kind, "reduction": reduction, "projector": torch.randn(5, 5)}
    dirty = [s.clone(), t.clone()]
    dirty[0][1] = dirty[1][1] = value
    clean, found = (
        evaluate(FEATURE, on(FEATURE, backend), {"student": a, "teacher": b, **options}) for a, b in ((s, t), dirty)
    )
    for (name, a), (_, b) in zip(found.items(), clean.items(), strict=True):
        assert_bitwise_equal(a, b, name)
    none = evaluate(
        FEATURE, on(FEATURE, backend), {"student": s, "teacher": t, **options, "mask": torch.zeros_like(mask)}
    )
    assert all(not bool(v.any()) for _, v in none.items())
    empty = evaluate(
        FEATURE,
        on(FEATURE, backend),
        {"student": s[:0], "teacher": t[:0], "kind": kind, "reduction": reduction},
    )
    assert all(not bool(v.any()) for _, v in empty.items())
    bad = mfd.feature_loss(*dirty, kind=kind, reduction="none", backend=backend)
    assert not bool(bad[1].isfinite())
    assert bool(bad[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("backend", FEATURE.backends)
def test_cosine_of_a_zero_vector(backend):
    s, t = torch.randn(2, 2, 5)
    s[0] = 0
    found = evaluate(FEATURE, on(FEATURE, backend), {"student": s, "teacher": t, "kind": "cosine", "reduction": "none"})
    assert found.outputs["loss"][0] == 1.0
    assert all(not bool(g[0].any()) for g in found.grads.values())
    assert all(bool(v.isfinite().all()) for _, v in found.items())


@pytest.mark.parametrize("backend", MFD.backends)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["everything", "per_row"])
def test_mfd_loss_row_that_does_not_exist(backend, value, name):
    clean = MFD.samples()[name]
    dirty = dict(clean)
    dirty["features"] = [f.clone() for f in clean["features"]]
    for f in dirty["features"]:
        f[1] = value
    for key in ("teacher_logits", "teacher_features", "teacher_pool_weights", "weight"):
        dirty[key] = clean[key].clone()
        dirty[key][1] = value
    expected, found = (evaluate(MFD, on(MFD, backend), a) for a in (clean, dirty))
    for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        assert_bitwise_equal(a, b, key)
    assert found.outputs["predictions"][1] == -1
    assert not bool(found.outputs["weights"][1].any())


@pytest.mark.parametrize("backend", MFD.backends)
@pytest.mark.parametrize("why", ["masked", "empty"])
def test_mfd_loss_without_rows(backend, why):
    arguments = MFD.samples(rows=0 if why == "empty" else 4)["everything"]
    if why == "masked":
        arguments["mask"] = torch.zeros(4, dtype=torch.bool)
    found = evaluate(MFD, on(MFD, backend), arguments)
    for name, value in found.items():
        expected = -1 if name == "predictions" else 0
        assert bool((value == expected).all()), name


@pytest.mark.parametrize("backend", MFD.backends)
def test_mfd_loss_row_without_modalities(backend):
    """pooled = 0: the head's bias alone speaks, and no gradient reaches features, query or bias from that row."""
    arguments = MFD.samples()["everything"]
    arguments["present"] = torch.zeros_like(arguments["present"])
    arguments.update(pool_weight=0.0, teacher_pool_weights=None)
    found = evaluate(MFD, on(MFD, backend), arguments)
    assert not bool(found.outputs["weights"].any())
    for name, grad in found.grads.items():
        assert bool(grad.isfinite().all()), name
        if name.startswith("features") or name in ("query", "bias", "head_weight"):
            assert not bool(grad.any()), name
    assert bool(found.grads["head_bias"].any())
