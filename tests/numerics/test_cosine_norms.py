"""The cosine of rows whose norms are far from 1: their squares leave the range of the dtype, the cosine does not."""

import pytest
import torch
import torch.nn.functional as F
from harness import evaluate, on, to_float64
from op_db import RECORDS

FEATURE, MFD = RECORDS["feature_loss"], RECORDS["mfd_loss"]
# Below 2^-126 Triton's interpreter does not read bfloat16 as it is.
EXPONENTS = {
    torch.float32: (-44, -38, -30, -22, -19, -12, 12, 19, 20, 30, 37),
    torch.bfloat16: (-36, -22, -12, 12, 19, 30, 37),
    torch.float16: (-2, 3),
    torch.float64: (-300, -200, -160, -12, 140, 154, 200, 307),
}
CASES = [(dtype, e) for dtype, exponents in EXPONENTS.items() for e in exponents]
IDS = [f"{str(dtype)[6:]}-1e{e}" for dtype, e in CASES]
#: The least norm in the denominator, of torch.nn.functional.cosine_similarity.
EPSILON = 1e-8


def rows(dtype, exponent, width=37):
    """A row of that size, one of the other end, an ordinary one and 0, against an ordinary one; and the reverse."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 4, width, generator=generator, dtype=torch.float64)
    x = x / x.abs().amax(-1, keepdim=True)
    sizes = torch.tensor([exponent, -exponent if dtype != torch.float16 else 0, 0, 0], dtype=torch.float64)
    sizes = sizes.clamp(-44 if dtype != torch.float64 else -300, 37 if dtype != torch.float64 else 307)
    x = x * 10.0 ** sizes[:, None]
    x[3] = 0
    s, t = torch.cat([x, y, x]).to(dtype), torch.cat([y, x, x.roll(1, 0)]).to(dtype)
    return s, t


def assert_close_rows(actual, exact, dtype, context):
    """Each row within rounding of its own size, or of the least normal number."""
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    error = (actual.double() - exact).abs().flatten(1).amax(-1)
    size = exact.abs().flatten(1).amax(-1)
    assert bool(actual.isfinite().all()), context
    assert bool((error <= 16 * eps * size + tiny).all()), (context, error, size)


def upstream(output, seed):
    """So small that a gradient of 1/EPSILON is within float16's range."""
    return torch.full_like(output, 2.0**-14)


@pytest.mark.parametrize(("dtype", "exponent"), CASES, ids=IDS)
@pytest.mark.parametrize("backend", FEATURE.backends)
def test_feature_rows_of_any_norm(backend, dtype, exponent):
    s, t = rows(dtype, exponent)
    call = {"student": s, "teacher": t, "kind": "cosine", "reduction": "none"}
    found = evaluate(FEATURE, on(FEATURE, backend), call, grad_outputs=upstream)
    exact = evaluate(FEATURE, on(FEATURE, "reference"), to_float64(call), grad_outputs=upstream)
    torch.testing.assert_close(found.outputs["loss"].double(), exact.outputs["loss"], rtol=1e-5, atol=1e-6)
    for name, grad in found.grads.items():
        assert_close_rows(grad, exact.grads[name], dtype, f"{backend} {name}")


@pytest.mark.parametrize("exponent", [-120, -22, -9, -7, 0, 20, 120])
def test_the_reference_is_the_cosine_of_pytorch(exponent):
    s, t = rows(torch.float64, exponent)
    found = evaluate(
        FEATURE, on(FEATURE, "reference"), {"student": s, "teacher": t, "kind": "cosine", "reduction": "none"}
    )
    torch.testing.assert_close(found.outputs["loss"], 1 - F.cosine_similarity(s, t, dim=-1), rtol=1e-12, atol=1e-12)
    zero = ~(s.any(-1) & t.any(-1))
    for grad in found.grads.values():
        assert bool(grad.isfinite().all())
        assert float(grad.norm(dim=-1).max()) <= 1.001 / EPSILON * 4
        assert not bool(grad[zero].any())


@pytest.mark.parametrize(("dtype", "exponent"), [c for c in CASES if c[0] in (torch.float32, torch.float64)])
@pytest.mark.parametrize("soft_weight", [0.0, 1.0])  # 0: Triton has no single pass for it
@pytest.mark.parametrize("backend", MFD.backends)
def test_fused_rows_of_any_norm(backend, soft_weight, dtype, exponent):
    """The logits of both sides are 0, so that the divergence adds nothing."""
    target, x = rows(dtype, exponent)
    n, width = x.shape
    features = torch.stack([x, x]).unbind()
    call = {
        "features": [f.clone() for f in features],
        "query": torch.zeros(width, dtype=dtype),
        "head_weight": torch.zeros(5, width, dtype=dtype),
        "head_bias": torch.zeros(5, dtype=dtype),
        "teacher_logits": torch.zeros(n, 5, dtype=dtype),
        "teacher_features": target,
        "feature_kind": "cosine",
        "soft_weight": soft_weight,
        "feature_weight": 1.0,
        "reduction": "sum",
    }
    found = evaluate(MFD, on(MFD, backend), call, names=("features",), grad_outputs=upstream)
    exact = evaluate(MFD, on(MFD, "reference"), to_float64(call), names=("features",), grad_outputs=upstream)
    for name, grad in found.grads.items():
        assert_close_rows(grad, exact.grads[name], dtype, f"{backend} {name}")
