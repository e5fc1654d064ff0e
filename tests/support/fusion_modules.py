"""Eager twins of the fusion modules (also for benchmarks), and the cases their tests run over."""

import torch
import torch.nn.functional as F
from torch import nn

import mfd_fast as mfd

WIDTHS, OUT = (6, 4, 5), 7
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def projected_then_stacked(fusion, features, present=None, temperature=1.0):
    """ModalFusion in plain PyTorch: M projections, a stack, a softmax, a weighted sum."""
    start, projected = 0, []
    for m, x in enumerate(features):
        weight = fusion.weight[:, start : start + x.shape[-1]]
        projected.append(F.linear(x, weight, None if fusion.bias is None else fusion.bias[m]))
        start += x.shape[-1]
    stacked = torch.stack(projected, -2)
    if fusion.score_weight is not None:
        scores = F.linear(torch.cat(list(features), -1), fusion.score_weight, fusion.score_bias)
    elif fusion.query is not None:
        scores = stacked @ fusion.query * fusion.out_features**-0.5 + fusion.score_bias
    else:
        scores = fusion.score_bias.expand(stacked.shape[:-1])
    scores = scores / temperature
    if present is not None:
        scores = scores.masked_fill(~present, -torch.inf)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(-1) * stacked).sum(-2), weights


class LinearAttentionFusion(nn.Module):
    """The function of torchmultimodal's AttentionFusionModule, with the parameters of a ModalFusion ("linear")."""

    def __init__(self, fusion):
        super().__init__()
        form = {"device": fusion.weight.device, "dtype": fusion.weight.dtype}
        self.attention = nn.Linear(sum(fusion.in_features), len(fusion.in_features), **form)
        self.projections = nn.ModuleList(nn.Linear(d, fusion.out_features, **form) for d in fusion.in_features)
        with torch.no_grad():
            self.attention.weight.copy_(fusion.score_weight)
            self.attention.bias.copy_(fusion.score_bias)
            for m, weight in enumerate(fusion.weight.split(fusion.in_features, 1)):
                self.projections[m].weight.copy_(weight)
                self.projections[m].bias.copy_(fusion.bias[m])

    def forward(self, features):
        weights = torch.softmax(self.attention(torch.cat(list(features), -1)), -1)
        parts = [p(x) * weights[..., m, None] for m, (p, x) in enumerate(zip(self.projections, features, strict=True))]
        return torch.stack(parts).sum(0)


def low_rank(module, features):
    """LowRankFusion as the paper writes it: every factor, stacked, then the product over modalities."""
    z = []
    for x, factor in zip(features, module.factors, strict=True):
        padded = torch.cat([torch.ones_like(x[..., :1]), x], -1)
        z.append(torch.einsum("...d,dro->...ro", padded, factor))
    y = torch.einsum("r,...ro->...o", module.rank_weight, torch.stack(z).prod(0))
    return y if module.bias is None else y + module.bias


def modal(scoring="linear", fold=None, **options):
    return lambda **form: mfd.nn.ModalFusion(WIDTHS, OUT, scoring=scoring, fold=fold, **options, **form)


def gated(kind, **options):
    sizes = (6,) if kind == "tanh" else (6, 4) if kind == "film" else (6, 4, 5)
    return lambda **form: mfd.nn.GatedFusion(*sizes, kind=kind, **options, **form)


MODULES = {
    **{f"modal {s} {f}": modal(s, f) for s in ("linear", "query", "prior") for f in (True, False)},
    "modal without bias": modal("query", True, bias=False),
    "modal cold": modal("linear", None, temperature=0.3),
    **{kind: gated(kind) for kind in ("tanh", "sigmoid", "gmu", "film")},
    "tanh per channel": gated("tanh", per_channel=True),
    "gmu without bias": gated("gmu", bias=False),
    "low rank": lambda **form: mfd.nn.LowRankFusion(WIDTHS, OUT, 3, **form),
    "low rank without bias": lambda **form: mfd.nn.LowRankFusion(WIDTHS, OUT, 3, bias=False, **form),
}
STATES = {
    "modal linear True": {"weight", "bias", "score_weight", "score_bias"},
    "modal query True": {"weight", "bias", "query", "score_bias"},
    "modal prior True": {"weight", "bias", "score_bias"},
    "modal without bias": {"weight", "query", "score_bias"},
    "tanh": {"gate"},
    "sigmoid": {"gate.weight", "gate.bias", "value.weight", "value.bias"},
    "gmu": {f"{layer}.{kind}" for layer in ("x_value", "h_value", "gate") for kind in ("weight", "bias")},
    "film": {"film.weight", "film.bias"},
    "low rank": {"factors.0", "factors.1", "factors.2", "rank_weight", "bias"},
}
COMPILED = ("modal linear True", "modal query True", "modal linear False", "tanh", "sigmoid", "gmu", "film", "low rank")


def made(name, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    module = MODULES[name](dtype=dtype)
    with torch.no_grad():  # no parameter at 0: every path carries a gradient
        for p in module.parameters():
            p.add_(torch.randn_like(p, dtype=torch.float32).mul_(0.3).to(p.dtype))
    return module


def inputs(module, *leading, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = (module.x_features, module.h_features) if isinstance(module, mfd.nn.GatedFusion) else module.in_features
    features = [torch.randn(*leading, d, generator=generator, dtype=torch.float64).to(dtype) for d in widths]
    present = torch.rand(*leading, len(widths), generator=generator) < 0.6
    if leading and leading[0] > 2:
        present[0], present[1] = True, False
    return features, present


def call(module, features, present=None, **options):
    """(fused, weights or None)."""
    if isinstance(module, mfd.nn.GatedFusion):
        return module(*features, present), None
    out = module(features, present, **options)
    return out if isinstance(out, tuple) else (out, None)
