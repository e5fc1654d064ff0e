"""Second oracle of the divergences: values and analytic slopes from p and q in float64 NumPy.

Formulas: the table of the numerics (master rule dD/du = q (g − E_q[g]), g = ∂f/∂q) and the papers named in
mfd_fast.divergences. DKD: Zhao et al. arXiv:2203.08679; NKD: Yang et al. arXiv:2303.13005.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TopK:
    values: Array
    indices: Array
    mask: Array | None
    tail: str
    values_are: str

    @property
    def known(self) -> Array:
        """The values, −inf where a candidate pads the list."""
        return self.values if self.mask is None else np.where(self.mask, self.values, -np.inf)

    def columns(self, rows: int, classes: int) -> Array:
        """The indices ``[N, K]``; where a candidate pads the list, the column behind the classes."""
        columns = self.indices if self.mask is None else np.where(self.mask, self.indices, classes)
        return columns.reshape(rows, -1)


def kl(p: Array, q: Array) -> Array:
    on = p > 0
    return np.where(on, p * np.log(np.where(on, p, 1.0) / np.where(on, q, 1.0)), 0.0).sum(-1)


def master(q: Array, g: Array) -> Array:
    return q * (g - (q * g).sum(-1, keepdims=True))


def evaluate(divergence: Any, p: Array, q: Array, label: Array | None) -> tuple[Array, Array, Array]:
    """D ``[N]`` (NKD: its second term), dD/du ``[N, C]`` and h = ∂D/∂p ``[N, C]``, up to a constant per row."""
    name, (a, b) = divergence.name, divergence.parameters
    one = np.where(p > 0, p, 1.0)  # for logarithms: the classes of a sparse teacher with p = 0 have no slope
    if name == "forward_kl":
        return kl(p, q), q * p.sum(-1, keepdims=True) - p, np.log(one / q) + 1
    if name == "cross_entropy":
        safe = np.where(q > 0, q, 1.0)
        return -(p * np.log(np.where(p > 0, q, 1.0))).sum(-1), q * p.sum(-1, keepdims=True) - p, -np.log(safe)
    if name == "reverse_kl":
        r = np.log(p / q)
        big = -(q * r).sum(-1, keepdims=True)
        return big[:, 0], q * (-r - big), -q / p
    if name == "jsd":
        m = a * p + (1 - a) * q
        return a * kl(p, m) + (1 - a) * kl(q, m), master(q, (1 - a) * np.log(q / m)), a * np.log(one / m)
    if name == "skew_kl":
        m = a * p + (1 - a) * q
        return kl(p, m), master(q, -(1 - a) * p / m), np.log(one / m) + 1 - a * p / m
    if name == "skew_reverse_kl":
        m = (1 - a) * p + a * q
        return kl(q, m), master(q, np.log(q / m) - a * q / m), -(1 - a) * q / m
    if name == "tvd":
        g = np.sign(q - p) / 2
        return np.abs(p - q).sum(-1) / 2, master(q, g), -g
    if name == "alpha_beta":
        return alpha_beta(p, q, a, b)
    assert label is not None
    row = np.arange(len(p))
    p_y, q_y = p[row, label], q[row, label]
    others = np.arange(p.shape[-1]) != label[:, None]
    p_rest, q_rest = np.where(others, p, 0.0).sum(-1), np.where(others, q, 0.0).sum(-1)
    p_hat, q_hat = np.where(others, p / p_rest[:, None], 0.0), np.where(others, q / q_rest[:, None], 0.0)
    safe_p, safe_q = np.where(others, p_hat, 1.0), np.where(others, q_hat, 1.0)
    if name == "nkd":
        value = -(p_hat * np.log(safe_q)).sum(-1)
        h = np.where(others, (-np.log(safe_q) - value[:, None]) / p_rest[:, None], 0.0)
        return value, q_hat - p_hat, h
    assert name == "dkd"
    inner = kl(p_hat, safe_q)
    value = a * (p_y * np.log(p_y / q_y) + p_rest * np.log(p_rest / q_rest)) + b * inner
    gap = (q_y - p_y)[:, None]
    du = np.where(others, -a * gap * q_hat + b * (q_hat - p_hat), a * gap)
    of_rest = a * np.log(p_rest / q_rest)[:, None]
    h_others = of_rest + b * (np.log(safe_p / safe_q) - inner[:, None]) / p_rest[:, None]
    return value, du, np.where(others, h_others, a * np.log(p_y / q_y)[:, None])


def alpha_beta(p: Array, q: Array, a: float, b: float) -> tuple[Array, Array, Array]:
    r = np.log(p / q)
    if a == 0 and b == 0:
        value = (r**2).sum(-1) / 2
    elif a == 0:
        value = (q**b * -b * r - q**b + p**b).sum(-1) / b**2
    elif b == 0:
        value = (p**a * a * r - p**a + q**a).sum(-1) / a**2
    elif a + b == 0:
        value = (-a * r + (p / q) ** a - 1).sum(-1) / a**2
    else:
        value = -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)
    g = q ** (b - 1) * (-r if a == 0 else (q**a - p**a) / a)
    h = p ** (a - 1) * (r if b == 0 else (p**b - q**b) / b)
    return value, master(q, g), h


def first_of_nkd(p: Array, q: Array, label: Array) -> tuple[Array, Array, Array]:
    """−p_y log q_y at temperature 1, its slope in u, and h."""
    onehot = np.eye(p.shape[-1])[label]
    p_y, log_q_y = (p * onehot).sum(-1, keepdims=True), np.log((q * onehot).sum(-1, keepdims=True))
    return (-p_y * log_q_y)[:, 0], p_y * (q - onehot), -onehot * log_q_y


@dataclass(frozen=True)
class Pair:
    """p and q over the classes compared, with what leads back to the logits."""

    p: Array
    q: Array
    full_q: Array  # student over all C classes
    each: list[Array]  # every teacher's own distribution; a TopK's K (+ 1) classes
    label: Array | None


def softmax(u: Array) -> Array:
    e = np.exp(u - u.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sparse_logits(y: Array, topk: TopK, width: int) -> Array:
    """The K values and, where there is a rest, its logarithm."""
    if topk.values_are == "logits" or topk.tail == "renormalize" or y.shape[-1] == width:
        return y
    return np.concatenate((y, np.log(1 - np.exp(y).sum(-1, keepdims=True))), -1)


def compare(
    x: Array, ys: list[Array], ts: Array, tt: Array, weights: Array, topk: TopK | None, label: Array | None
) -> Pair:
    full_q = softmax(x / ts[:, None])
    if topk is None:
        each = [softmax(y / tt[:, None]) for y in ys]
        return Pair(sum(weights[:, [k]] * p for k, p in enumerate(each)), full_q, full_q, each, label)
    indices = topk.columns(*x.shape)
    wide = np.pad(full_q, ((0, 0), (0, 1)))
    p = softmax(sparse_logits(ys[0], topk, x.shape[-1]) / tt[:, None])
    listed, k = np.take_along_axis(wide, indices, -1), indices.shape[-1]
    at = None if label is None else (indices == label[:, None]).argmax(-1)
    if topk.tail == "renormalize":
        return Pair(p, listed / listed.sum(-1, keepdims=True), full_q, [p], at)
    if topk.tail == "zero":
        dense = np.zeros_like(wide)
        np.put_along_axis(dense, indices, p[:, :k], -1)
        return Pair(dense[:, :-1], full_q, full_q, [p], label)
    rest_p = p[:, k:] if p.shape[-1] > k else np.zeros((len(x), 1))
    both = np.concatenate((p[:, :k], rest_p), -1)
    rest = wide.copy()
    np.put_along_axis(rest, indices, 0.0, -1)
    return Pair(both, np.concatenate((listed, rest.sum(-1, keepdims=True)), -1), full_q, [p], at)


def back_to_student(pair: Pair, du: Array, topk: TopK | None) -> Array:
    """dD/du over all C classes."""
    if topk is None or topk.tail == "zero":
        return du
    indices = topk.columns(*pair.full_q.shape)
    k = indices.shape[-1]
    full = np.zeros_like(np.pad(pair.full_q, ((0, 0), (0, 1))))
    if topk.tail == "bucket":
        full[:, :-1] = du[:, [k]] * pair.full_q / pair.q[:, [k]]
    np.put_along_axis(full, indices, du[:, :k], -1)
    return full[:, :-1]


def back_to_teachers(
    pair: Pair, h: Array, ys: list[Array], tt: Array, weights: Array, topk: TopK | None
) -> tuple[list[Array], Array, Array]:
    """dD/dy of every teacher, dD/dT_t per row, and dD/dw per row."""
    slope, of_weights = np.zeros(len(h)), np.zeros((len(h), len(ys)))
    found = []
    for j, (y, p) in enumerate(zip(ys, pair.each, strict=True)):
        if topk is None:
            v, b, weight = y, p * h, weights[:, [j]]
        else:
            v, weight = sparse_logits(y, topk, pair.full_q.shape[-1]), 1.0
            if topk.tail == "zero":
                h = np.take_along_axis(np.pad(h, ((0, 0), (0, 1))), topk.columns(*pair.full_q.shape), -1)
            known = min(h.shape[-1], p.shape[-1])
            b = np.zeros_like(p)
            b[:, :known] = p[:, :known] * h[:, :known]
        of_weights[:, j] = b.sum(-1)
        dv = weight * (b - p * b.sum(-1, keepdims=True))
        slope -= (dv * np.where(dv == 0, 0.0, v)).sum(-1) / tt**2
        dy = dv[:, : y.shape[-1]]
        if v.shape[-1] > y.shape[-1]:  # d log(1 − Σ e^y)/dy = −e^y/(1 − Σ e^y)
            dy = dy - dv[:, -1:] * np.exp(y) / (1 - np.exp(y).sum(-1, keepdims=True))
        found.append(dy / tt[:, None])
    return found, slope, of_weights
