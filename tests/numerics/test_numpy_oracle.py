"""The reference and the NumPy formulas, written independently, agree to 1e-12, values and every gradient."""

import numpy as np
import numpy_oracle as oracle
import pytest
import torch
from harness import evaluate, map_tensors, on
from numpy_oracle_linear import linear_distill_loss
from op_db import RECORDS

from mfd_fast import LogitTransform, TopK
from mfd_fast.testing import DISTANCES

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def numpy_arguments(arguments):
    def convert(value):
        if isinstance(value, torch.Tensor):
            return value.numpy()
        if isinstance(value, LogitTransform):
            return oracle.Transform(value.scale, value.softcap, value.classes, value.standardize)
        return value

    def tree(value):
        if isinstance(value, TopK):
            tensors = (value.values, value.indices, value.mask)
            return oracle.TopK(*(t if t is None else t.numpy() for t in tensors), value.tail, value.values_are)
        return convert(map_tensors(value, lambda t: t.numpy()))

    converted = {k: tree(v) for k, v in arguments.items()}
    if isinstance(converted.get("features"), np.ndarray):
        converted["features"] = list(np.moveaxis(converted["features"], -2, 0))
    return converted


def run_reference(record, arguments):
    """Gradients for an upstream gradient of ones in every differentiable output."""
    return evaluate(record, on(record, "reference"), arguments, grad_outputs=lambda t, _: torch.ones_like(t))


def agree(actual, expected, name):
    np.testing.assert_allclose(actual.numpy(), expected, **TOLERANCE, err_msg=name)


def samples_of(op, distance="far", seed=0):
    return RECORDS[op].samples(dtype=torch.float64, distance=distance, seed=seed)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", samples_of("distill_loss"))
@pytest.mark.parametrize("seed", [0, 1])
def test_distill_loss_is_that_of_numpy(name, distance, seed):
    arguments = samples_of("distill_loss", distance, seed)[name]
    loss, grads = oracle.distill_loss(**numpy_arguments(arguments))
    result = run_reference(RECORDS["distill_loss"], arguments)
    values = loss if isinstance(loss, dict) else {"loss": loss}
    assert result.outputs.keys() == values.keys()
    for field, value in result.outputs.items():
        agree(value, values[field], field)
    assert "student" in result.grads
    assert arguments["teacher"] is None or any(name.startswith("teacher") for name in result.grads)
    for argument, grad in result.grads.items():
        agree(grad, grads[argument], f"d {argument}")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", samples_of("distill_terms"))
def test_distill_terms_are_those_of_numpy(name, distance):
    arguments = samples_of("distill_terms", distance)[name]
    expected = oracle.distill_terms(**numpy_arguments(arguments))
    result = run_reference(RECORDS["distill_terms"], arguments)
    assert result.outputs.keys() == {k for k, v in expected.items() if v is not None}
    for field, value in result.outputs.items():
        agree(value, expected[field], field)
    lead = arguments["student"].shape[:-1]
    grads = oracle.distill_backward(np.ones(lead), np.ones(lead), **numpy_arguments(arguments))
    if "teacher_temperature" not in arguments:
        grads["temperature"] = grads["temperature"] + grads["teacher_temperature"]
    for argument, grad in result.grads.items():
        shared = argument.endswith("temperature") and not grad.dim()
        expected_grad = np.asarray(grads[argument].sum()) if shared else grads[argument]
        agree(grad, expected_grad, f"d {argument}")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", samples_of("modal_pool"))
def test_modal_pool_is_that_of_numpy(name, seed):
    arguments = samples_of("modal_pool", seed=seed)[name]
    record = RECORDS["modal_pool"]
    ups = {}

    def random_upstream(t, number):
        ups[t.shape[-1]] = torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(number))
        return ups[t.shape[-1]]

    result = evaluate(record, on(record, "reference"), arguments, grad_outputs=random_upstream)
    pooled, weights, grads = oracle.modal_pool(
        **numpy_arguments(arguments), grad_pooled=ups[11].numpy(), grad_weights=ups[3].numpy()
    )
    agree(result.outputs["pooled"], pooled, "pooled")
    agree(result.outputs["weights"], weights, "weights")
    grads.update({f"features[{m}]": g for m, g in enumerate(grads["features"])})
    grads["features"] = np.stack(grads["features"], -2)
    for argument, grad in result.grads.items():
        agree(grad, grads[argument], f"d {argument}")


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["mse", "cosine", "taps"])
def test_feature_loss_is_that_of_numpy(name, kind, reduction):
    record = RECORDS["feature_loss"]
    arguments = {**samples_of("feature_loss")[name], "kind": kind}
    if name == "cosine":
        arguments["student"] = arguments["student"].clone()
        arguments["student"][0] = 0  # a zero vector
    if name != "taps":
        arguments["reduction"] = reduction
    result = run_reference(record, arguments)
    converted = numpy_arguments(arguments)
    single = name != "taps"
    for side in ("student", "teacher"):
        converted[side] = [converted[side]] if single else converted[side]
    if isinstance(converted.get("weight"), np.ndarray):
        converted["weight"] = list(converted["weight"])
    loss, grads = oracle.feature_loss(**converted)
    agree(result.outputs["loss"], loss, "loss")
    for argument, grad in result.grads.items():
        if argument == "weight":
            continue
        key, _, rest = argument.partition("[")
        index = int(rest[:-1]) if rest else 0
        position = index if key != "projector" else 0
        agree(grad, grads[key][position], f"d {argument}")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("name", samples_of("mfd_loss"))
def test_mfd_loss_is_that_of_numpy(name, kind, seed):
    record = RECORDS["mfd_loss"]
    arguments = {**samples_of("mfd_loss", seed=seed)[name], "feature_kind": kind}
    expected, grads = oracle.mfd_loss(**numpy_arguments(arguments))
    names = ("features", "query", "bias", "head_weight", "head_bias")
    result = evaluate(
        record, on(record, "reference"), arguments, names=names, grad_outputs=lambda t, _: torch.ones_like(t)
    )
    hard = "labels" in arguments  # a term of weight 0 is not computed and reads 0
    for field, value in result.outputs.items():
        if field in ("hard", "feature") and not hard:
            assert not value.any()
            continue
        agree(value, expected[field], field)
    grads.update({f"features[{m}]": g for m, g in enumerate(grads["features"])})
    for argument, grad in result.grads.items():
        agree(grad, grads[argument], f"d {argument}")


def test_oracle_gradients_are_those_of_its_values():
    """Central differences of the oracle itself, in the directions of every argument."""
    arguments = samples_of("distill_loss")["labels"]
    arguments = numpy_arguments({**arguments, "temperature": arguments["weight"] + 1.0})
    _, grads = oracle.distill_loss(**arguments)
    step = 1e-6
    rng = np.random.default_rng(0)
    for name in ("student", "teacher", "temperature", "weight"):
        direction = rng.standard_normal(arguments[name].shape)
        ends = [oracle.distill_loss(**{**arguments, name: arguments[name] + s * direction})[0] for s in (step, -step)]
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(slope, (grads[name] * direction).sum(), rtol=1e-7, err_msg=name)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", samples_of("linear_distill_loss"))
def test_linear_distill_loss_is_that_of_numpy(name, distance):
    arguments = samples_of("linear_distill_loss", distance)[name]
    expected, grads = linear_distill_loss(**numpy_arguments(arguments))
    result = run_reference(RECORDS["linear_distill_loss"], arguments)
    for field, value in result.outputs.items():
        agree(value, expected[field], field)
    assert {"student_hidden", "student_weight"} <= result.grads.keys()
    for argument, grad in result.grads.items():
        agree(grad, grads[argument.removesuffix(".values")], f"d {argument}")
