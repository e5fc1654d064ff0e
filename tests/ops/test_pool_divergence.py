"""mfd_loss's KL(teacher_pool_weights ‖ weights) where weights underflow: it is that of the log-softmax."""

import pytest
import torch
from harness import evaluate, named_tensors, on, requiring_grad, to_float64
from op_db import RECORDS
from torch.nn import functional as F

MFD = RECORDS["mfd_loss"]
LEAVES = ("features", "query", "bias", "head_weight", "head_bias")
#: By reduction and what requires grad: one pass, and the chain of the ops with and without rows.
ROADS = {
    "one pass": ("mean", LEAVES),
    "chain": ("sum", (*LEAVES, "pool_temperature", "pool_weight", "teacher_pool_weights")),
    "rows": ("none", LEAVES),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def far_apart(dtype=torch.float32, width=8):
    """Scores over temperature about 150 and 1000 apart, two rows each; of either kind one row lacks a modality."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=rng)

    present = torch.ones(4, 3, dtype=torch.bool)
    present[1, 2] = present[3, 2] = False
    shares = torch.where(present, 0.1 + draw(4, 3).abs(), 0)
    acc = torch.promote_types(dtype, torch.float32)
    return {
        "features": [(0.5 * draw(4, width)).to(dtype) for _ in range(3)],
        "query": draw(width).to(dtype),
        "bias": torch.tensor([0.0, -75.0, -37.5]).to(dtype),
        "head_weight": (0.3 * draw(5, width)).to(dtype),
        "head_bias": draw(5).to(dtype),
        "teacher_logits": draw(4, 5).to(dtype),
        "present": present,
        "pool_temperature": torch.tensor([0.5, 0.5, 0.075, 0.075], dtype=acc),
        "teacher_pool_weights": (shares / shares.sum(-1, keepdim=True)).to(acc),
        "pool_weight": torch.tensor(0.7, dtype=acc),
    }


def exact_loss(
    features, query, bias, head_weight, head_bias, teacher_logits, present, pool_temperature, teacher_pool_weights,
    pool_weight, reduction,
):  # fmt: skip
    scores = torch.stack([x @ query for x in features], -1) * query.numel() ** -0.5 + bias
    scores = torch.where(present, scores / pool_temperature[:, None], -torch.inf)
    pooled = (scores.softmax(-1)[..., None] * torch.stack(features, 1)).sum(1)
    logits = pooled @ head_weight.T + head_bias
    rows = F.kl_div(logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="none").sum(-1)
    log_weights = torch.where(present, scores.log_softmax(-1), 0)
    rows = rows + pool_weight * (torch.special.xlogy(teacher_pool_weights, teacher_pool_weights)).sum(-1)
    rows = rows - pool_weight * (teacher_pool_weights * log_weights).sum(-1)
    return {"loss": rows if reduction == "none" else getattr(rows, reduction)()}


def loss_on(backend):
    return lambda **arguments: {"loss": on(MFD, backend)(**arguments).loss}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("backend", MFD.backends)
def test_value_and_gradients_where_weights_underflow(backend, road, dtype):
    reduction, names = ROADS[road]
    call = {**far_apart(DTYPES[dtype]), "reduction": reduction}
    found = evaluate(MFD, loss_on(backend), call, names=names)
    exact = evaluate(MFD, exact_loss, to_float64(call), names=names)
    assert not bool(on(MFD, backend)(**call).weights[:, 1].any())
    torch.testing.assert_close(found.outputs["loss"].double(), exact.outputs["loss"], rtol=1e-6, atol=0)
    if "teacher_pool_weights" in names:  # at 0 the derivative is infinite; 0 stands for it
        exact.grads["teacher_pool_weights"].masked_fill_(call["teacher_pool_weights"] == 0, 0.0)
    for name, gradient in exact.grads.items():
        # Of bfloat16 inputs the head's products may read 16 bits.
        atol = (2e-6 if dtype == "float32" else 1e-2) * float(gradient.abs().max())
        message = lambda m, n=name: f"d {n}: {m}"  # noqa: E731
        torch.testing.assert_close(found.grads[name].double(), gradient, rtol=0, atol=atol, msg=message)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("backend", MFD.backends)
def test_weight_on_an_absent_modality_is_infinite_with_finite_gradients(backend, road):
    call = {**far_apart(), "reduction": ROADS[road][0]}
    call["teacher_pool_weights"][1, 2] = 0.25
    names = LEAVES if road != "chain" else (*LEAVES, "pool_temperature")
    found = evaluate(MFD, loss_on(backend), call, names=names)
    exact = evaluate(MFD, loss_on("reference"), to_float64(call), names=names)
    assert bool(torch.isposinf(exact.outputs["loss"]).any())
    assert torch.equal(torch.isposinf(found.outputs["loss"]), torch.isposinf(exact.outputs["loss"]))
    for name, gradient in exact.grads.items():
        atol = 2e-6 * float(gradient.abs().max())
        torch.testing.assert_close(found.grads[name].double(), gradient, rtol=0, atol=atol)


def test_derivatives_of_the_reference():
    names = ("features", "query", "bias", "pool_temperature")
    arguments = requiring_grad(far_apart(torch.float64, width=2), names)
    leaves = {k: v for k, v in named_tensors(arguments).items() if v.requires_grad}

    def loss(*values):
        new = dict(zip(leaves, values, strict=True))
        features = [new.pop(f"features[{m}]") for m in range(3)]
        return loss_on("reference")(**{**arguments, **new, "features": features})["loss"]

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(loss, tuple(leaves.values()))
