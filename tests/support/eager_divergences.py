"""The divergences as their authors or trainers write them, in the dtype of the inputs: part of the yardstick."""

import torch
import torch.nn.functional as F


def kl(log_p, log_q):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def log_mix(first, second, weight):
    """log(weight·first + (1 − weight)·second) of log-probabilities, as TRL's GKD trainer has it."""
    weight = torch.tensor(weight, dtype=first.dtype)
    return torch.logsumexp(torch.stack([first + torch.log(weight), second + torch.log1p(-weight)]), 0)


def alpha_beta(p, q, a, b):
    """Cichocki, Cruces, Amari (2011), with its limits."""
    if a == 0 and b == 0:
        return 0.5 * (p.log() - q.log()).square().sum(-1)
    if a == 0:
        return (q**b * (q**b / p**b).log() - q**b + p**b).sum(-1) / b**2
    if b == 0:
        return (p**a * (p**a / q**a).log() - p**a + q**a).sum(-1) / a**2
    if a + b == 0:
        return ((q**a / p**a).log() + p**a / q**a - 1).sum(-1) / a**2
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def other_classes(log_p, label):
    """log p̂ without the label's column, ``[..., C-1]``."""
    keep = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, label.unsqueeze(-1), False)
    others = log_p[keep].reshape(*log_p.shape[:-1], -1)
    return torch.log_softmax(others, -1)


def dkd(log_p, log_q, label, alpha, beta):
    def pair(log):
        target = log.exp().gather(-1, label.unsqueeze(-1))
        return torch.cat([target, 1 - target], -1).log()

    return alpha * kl(pair(log_p), pair(log_q)) + beta * kl(other_classes(log_p, label), other_classes(log_q, label))


def divergence(kind, log_p, log_q, label):
    """D per row; of NKD the second term."""
    name, (a, b) = kind.name, kind.parameters
    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "cross_entropy":
        return -(log_p.exp() * log_q.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "jsd":
        log_m = log_mix(log_p, log_q, a)
        return a * kl(log_p, log_m) + (1 - a) * kl(log_q, log_m)
    if name == "skew_kl":
        return kl(log_p, log_mix(log_p, log_q, a))
    if name == "skew_reverse_kl":
        return kl(log_q, log_mix(log_q, log_p, a))
    if name == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    if name == "alpha_beta":
        return alpha_beta(log_p.exp(), log_q.exp(), a, b)
    if name == "dkd":
        return dkd(log_p, log_q, label, a, b)
    return a * -(other_classes(log_p, label).exp() * other_classes(log_q, label)).sum(-1)


def of_label(log_p, log_q, label):
    """First term of NKD."""
    p, log_q = (x.gather(-1, label.unsqueeze(-1)).squeeze(-1) for x in (log_p.exp(), log_q))
    return -p * log_q


def dense(log_p, topk, classes):
    """Log-probabilities of all classes, −inf where nothing is listed."""
    wide = torch.full((*log_p.shape[:-1], classes + 1), -torch.inf, dtype=log_p.dtype)
    return wide.scatter(-1, columns(topk, classes), log_p)[..., :-1]


def columns(topk, classes):
    """The indices; where a candidate pads the list, the column behind the classes."""
    return topk.indices if topk.mask is None else topk.indices.masked_fill(~topk.mask, classes)


def sparse_teacher(topk, temperature):
    values = topk.values if topk.mask is None else topk.values.masked_fill(~topk.mask, -torch.inf)
    if topk.values_are == "logprobs" and topk.tail != "renormalize":
        values = torch.cat([values, torch.log1p(-values.exp().sum(-1, keepdim=True))], -1)
    return torch.log_softmax(values / temperature, -1)


def sparse_pair(x, topk, temperature, teacher_temperature):
    """log p and log q over the classes that are compared."""
    log_p, log_q = sparse_teacher(topk, teacher_temperature), torch.log_softmax(x / temperature, -1)
    k = topk.values.shape[-1]
    wide = torch.cat([log_q, torch.full_like(log_q[..., :1], -torch.inf)], -1)
    listed = wide.gather(-1, columns(topk, x.shape[-1]))
    if topk.tail == "renormalize":
        return log_p, torch.log_softmax(listed, -1)
    if topk.tail == "zero":  # of the forward KL, to which a class of p = 0 adds nothing
        return log_p[..., :k], listed
    rest = 1 - listed.exp().sum(-1, keepdim=True)
    return log_p, torch.cat([listed, rest.log()], -1)
