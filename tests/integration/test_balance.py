"""Balance statistics, OGM-GE coefficients and gradient modulation: values, no host synchronisation, hooks."""

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import mfd_fast as mfd
from mfd_fast.balance import GradientModulation, modality_statistics, ogm_coefficients
from mfd_fast.testing import assert_bitwise_equal

ROWS, CLASSES = 12, 7


class NoHostRead(TorchDispatchMode):
    """Fails on whatever brings a value, or a size that depends on one, to the host."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        assert name not in self.FORBIDDEN, f"{name} reads a value back to the host"
        return func(*args, **(kwargs or {}))


def problem(modalities=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(ROWS, CLASSES, generator=generator).mul(2).to(dtype) for _ in range(modalities)]
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    present = torch.rand(ROWS, modalities, generator=generator) < 0.7
    return logits, labels, present


def eager_statistics(logits, labels, temperature=1.0):
    out = []
    for z in logits:
        log_p = (z.double() / temperature).log_softmax(-1)
        prob = log_p.exp().gather(-1, labels[:, None])[:, 0]
        out.append(
            (prob, -(log_p.exp() * log_p).sum(-1), nn.functional.cross_entropy(z.double(), labels, reduction="none"))
        )
    return [torch.stack(field, -1) for field in zip(*out, strict=True)]


def paper(prob, alpha):
    """The two-modality equation of OGM-GE with Python numbers, as its authors' loop has it."""
    v, a = (float(s) for s in prob.double().sum(0))
    if v / a > 1:
        return [1 - math.tanh(alpha * v / a), 1.0]
    return [1.0, 1 - math.tanh(alpha * a / v)]


# ---------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_statistics(backend, temperature):
    logits, labels, _ = problem()
    found = modality_statistics(logits, labels, temperature=temperature, backend=backend)
    for name, a, b in zip(found._fields, found, eager_statistics(logits, labels, temperature), strict=True):
        assert a.shape == (ROWS, 3), name
        torch.testing.assert_close(a, b.float(), msg=name)
    stacked = modality_statistics(torch.stack(logits, -2), labels, temperature=temperature, backend=backend)
    for a, b in zip(found, stacked, strict=True):
        assert_bitwise_equal(a, b)


def test_statistics_are_detached_and_keep_leading_dimensions():
    logits, labels, present = problem()
    logits = [z.requires_grad_() for z in logits]
    flat = modality_statistics(logits, labels, present=present)
    deep = modality_statistics([z.reshape(3, 4, -1) for z in logits], labels.view(3, 4), present=present.view(3, 4, 3))
    for a, b in zip(flat, deep, strict=True):
        assert not a.requires_grad
        assert_bitwise_equal(a, b.reshape(ROWS, 3))
    half = modality_statistics([z.detach().bfloat16() for z in logits], labels)
    assert half.label_prob.dtype == torch.float32


def test_absent_modalities_and_ignored_rows():
    logits, labels, present = problem()
    labels[2] = -100
    expected = modality_statistics(logits, labels, present=present)
    poisoned = [torch.where(present[:, m, None], z, torch.nan) for m, z in enumerate(logits)]
    for a, b in zip(expected, modality_statistics(poisoned, labels, present=present), strict=True):
        assert_bitwise_equal(a, b)
        assert not a[~present].any()
        assert not a[2].any()


# -------------------------------------------------------------------------------------------------- coefficients


@pytest.mark.parametrize("alpha", [0.1, 0.8])
@pytest.mark.parametrize("seed", range(6))
def test_two_modalities_are_the_papers_equation(alpha, seed):
    logits, labels, _ = problem(2, seed=seed)
    prob = modality_statistics(logits, labels).label_prob
    torch.testing.assert_close(ogm_coefficients(prob, alpha=alpha), torch.tensor(paper(prob, alpha)))


def test_any_number_of_modalities_is_balanced():
    prob = torch.tensor([[0.2, 0.5, 0.1, 0.4], [0.3, 0.7, 0.1, 0.0]], dtype=torch.float64)
    s = prob.mean(0)  # 0.25, 0.6, 0.1, 0.2
    found = ogm_coefficients(prob, alpha=0.5)
    assert found.dtype == torch.float64
    ratio = s[1] / ((s[0] + s[2] + s[3]) / 3)
    torch.testing.assert_close(
        found, torch.stack([torch.ones(()), 1 - torch.tanh(0.5 * ratio), *torch.ones(2)]).double()
    )
    assert_bitwise_equal(found, ogm_coefficients(prob.view(1, 2, 4), alpha=torch.tensor(0.5)))
    # Equal modalities: nobody dominates, whatever their number.
    for modalities in (1, 2, 5):
        assert_bitwise_equal(ogm_coefficients(torch.full((4, modalities), 0.25), alpha=1.0), torch.ones(modalities))


def test_presence_counts_only_what_is_there():
    """The mean over the rows where a modality is: being rare is not being weak."""
    prob = torch.tensor([[0.8, 0.3, torch.nan], [torch.nan, 0.5, torch.nan], [0.6, 0.1, torch.nan]])
    present = ~prob.isnan()
    expected = ogm_coefficients(torch.tensor([[0.7, 0.3]]), alpha=0.4)
    torch.testing.assert_close(ogm_coefficients(prob, alpha=0.4, present=present), torch.cat([expected, torch.ones(1)]))
    assert_bitwise_equal(ogm_coefficients(prob, alpha=0.4, present=torch.zeros_like(present)), torch.ones(3))
    assert_bitwise_equal(ogm_coefficients(prob[:0], alpha=0.4), torch.ones(3))


def test_extreme_ratios_are_finite():
    prob = torch.tensor([[0.9, 0.0], [0.9, 0.0]])
    assert_bitwise_equal(ogm_coefficients(prob, alpha=1.0), torch.tensor([0.0, 1.0]))
    assert_bitwise_equal(ogm_coefficients(prob, alpha=0.0), torch.ones(2))
    assert_bitwise_equal(ogm_coefficients(torch.zeros(2, 2), alpha=1.0), torch.ones(2))
    assert bool(ogm_coefficients(torch.tensor([[torch.nan, 0.2]]), alpha=1.0).isfinite().all())


# ----------------------------------------------------------------------------------------- no host synchronisation


def whole(logits, labels, present, alpha):
    statistics = modality_statistics(logits, labels, present=present, backend="reference")
    return statistics, ogm_coefficients(statistics.label_prob, alpha=alpha, present=present)


def test_nothing_is_read_back_on_a_device():
    """On the meta device a value does not exist: whatever asked for one would raise."""
    logits, labels, present = (
        [z.to("meta") for z in value] if isinstance(value, list) else value.to("meta") for value in problem()
    )
    statistics, coefficients = whole(logits, labels, present, torch.tensor(0.3, device="meta"))
    assert coefficients.shape == (3,)
    assert coefficients.device.type == statistics.entropy.device.type == "meta"
    layers = [nn.Linear(4, 5, device="meta") for _ in range(3)]
    with GradientModulation(layers, noise=True) as modulation:
        modulation.set(coefficients)
        sum(layer(torch.ones(2, 4, device="meta")).sum() for layer in layers).backward()
    assert layers[0].weight.grad.shape == (5, 4)


def test_coefficients_and_hooks_dispatch_nothing_that_reads():
    logits, labels, present = problem()
    prob = modality_statistics(logits, labels, present=present).label_prob
    layers = [nn.Linear(4, 5) for _ in range(3)]
    with NoHostRead(), GradientModulation(layers, noise=True) as modulation:
        modulation.set(ogm_coefficients(prob, alpha=torch.tensor(0.3), present=present))
        sum(layer(torch.ones(2, 4)).sum() for layer in layers).backward()
    with NoHostRead(), pytest.raises(AssertionError, match="reads a value back"):
        prob.sum().item()


def test_one_graph_compiled_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(whole, fullgraph=True, backend=counter)
    for seed, alpha in enumerate((0.1, 0.5, 0.9)):
        arguments = (*problem(seed=seed), torch.tensor(alpha))
        for a, b in zip(call(*arguments)[0], whole(*arguments)[0], strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(call(*arguments)[1], whole(*arguments)[1])
    assert counter.frame_count == 1


# ---------------------------------------------------------------------------------------------------- modulation


def two_layers():
    torch.manual_seed(0)
    return nn.Linear(4, 50), nn.Linear(4, 50)


def gradients(layers, **options):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for layer in layers:
        layer.zero_grad()
    sum(layer(x).square().sum() for layer in layers).backward(**options)
    return [p.grad.clone() for layer in layers for p in layer.parameters()]


def test_modulation_multiplies_and_ends():
    layers = two_layers()
    plain = gradients(layers)
    modulation = GradientModulation([layer.parameters() for layer in layers])
    for grad, expected in zip(gradients(layers), plain, strict=True):
        assert_bitwise_equal(grad, expected)
    coefficients = torch.tensor([0.25, 1.0])
    modulation.set(coefficients)
    coefficients.zero_()  # a copy was taken
    for grad, expected in zip(gradients(layers), (plain[0] * 0.25, plain[1] * 0.25, *plain[2:]), strict=True):
        assert_bitwise_equal(grad, expected)
    modulation.remove()
    for grad, expected in zip(gradients(layers), plain, strict=True):
        assert_bitwise_equal(grad, expected)


def test_modulation_follows_each_backward_while_gradients_accumulate():
    layers = two_layers()
    plain = gradients(layers)
    for layer in layers:
        layer.zero_grad()
    with GradientModulation(list(layers)) as modulation:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        for k in (0.5, 0.25):
            modulation.set(torch.tensor([k, 1.0]))
            sum(layer(x).square().sum() for layer in layers).backward()
    torch.testing.assert_close(layers[0].weight.grad, 0.75 * plain[0])
    torch.testing.assert_close(layers[1].weight.grad, 2 * plain[2])


def test_noise_has_the_gradients_spread_and_a_generator():
    layers = two_layers()
    plain = gradients(layers)
    coefficients = torch.tensor([0.5, 1.0])

    def noisy(seed):
        generator = torch.Generator().manual_seed(seed)
        with GradientModulation(list(layers), noise=True, generator=generator) as modulation:
            modulation.set(coefficients)
            return gradients(layers)

    first, again, other = noisy(0), noisy(0), noisy(1)
    for a, b, c in zip(first, again, other, strict=True):
        assert_bitwise_equal(a, b)
        assert not torch.equal(a, c)
    draws = torch.stack([noisy(seed)[0] for seed in range(60)])
    torch.testing.assert_close(draws.mean(0), 0.5 * plain[0], rtol=0, atol=5 * float(plain[0].std()) / 60**0.5)
    assert float(draws.std(0).mean()) == pytest.approx(float(plain[0].std()), rel=0.05)


@pytest.mark.parametrize("noise", [False, True])
def test_sparse_gradients_are_modulated_too(noise):
    table = nn.Embedding(50, 30, sparse=True)
    rows = torch.tensor([3, 7, 7, 20])
    up = torch.randn(4, 30)
    (table(rows) * up).sum().backward()
    plain = table.weight.grad.to_dense()
    table.zero_grad()
    generator = torch.Generator().manual_seed(0)
    with GradientModulation([table], noise=noise, generator=generator) as modulation:
        modulation.set(torch.tensor([0.5]))
        (table(rows) * up).sum().backward()
    assert table.weight.grad.is_sparse
    found = table.weight.grad.to_dense()
    held = torch.zeros(50, dtype=torch.bool)
    held[rows] = True
    assert not found[~held].any()
    spread = float((found - 0.5 * plain)[held].std())
    assert spread == pytest.approx(float(plain[held].std()) if noise else 0.0, rel=0.3, abs=1e-6)
    torch.optim.SGD(table.parameters(), lr=0.1).step()
    assert bool(table.weight.isfinite().all())


def test_a_single_number_gets_no_noise():
    gate = nn.Parameter(torch.ones(1))
    with GradientModulation([[gate]], noise=True) as modulation:
        modulation.set(torch.tensor([0.5]))
        (3 * gate).sum().backward()
    assert_bitwise_equal(gate.grad, torch.tensor([1.5]))


def test_a_training_step_holds_back_the_dominant_modality():
    """Two encoders, two heads that are summed: the one that predicts better gets the smaller step."""
    layers = [nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)]
    labels = torch.arange(CLASSES)
    strong, weak = nn.functional.one_hot(labels, CLASSES).float()[:, :6] * 5, torch.randn(CLASSES, 6)
    with torch.no_grad():
        layers[0].weight.copy_(torch.eye(CLASSES)[:, :6])
    with GradientModulation(layers) as modulation:
        own = [layers[0](strong), layers[1](weak)]
        k = ogm_coefficients(modality_statistics([z.detach() for z in own], labels).label_prob, alpha=0.5)
        assert float(k[0]) < 1.0 == float(k[1])
        modulation.set(k)
        loss = mfd.distill_loss(sum(own), torch.zeros(CLASSES, CLASSES), labels, soft_weight=0.0, hard_weight=1.0)
        plain = torch.autograd.grad(loss, [layer.weight for layer in layers], retain_graph=True)
        loss.backward()
    torch.testing.assert_close(layers[1].weight.grad, plain[1])
    assert float(layers[0].weight.grad.norm()) < float(layers[1].weight.grad.norm())


# -------------------------------------------------------------------------------------------------------- errors

Z, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
P = torch.zeros(2, 2)
ERRORS = [
    (
        lambda: modality_statistics([Z, Z[:1]], Y),
        ValueError,
        r"modality_statistics: logits\[1\] must be of shape \[2, 3\]",
    ),
    (lambda: modality_statistics([], Y), TypeError, "modality_statistics: logits must be a sequence of tensors"),
    (lambda: modality_statistics([Z], Y.float()), TypeError, "modality_statistics: labels must be a int64 tensor"),
    (lambda: modality_statistics([Z, Z], Y, present=P), TypeError, "modality_statistics: present must be a bool"),
    (lambda: modality_statistics([Z], Y + 3), ValueError, r"labels must be in \[0, 3\) or ignore_index"),
    (lambda: ogm_coefficients(P, alpha="1"), TypeError, "ogm_coefficients: alpha must be a number or a 0-d tensor"),
    (lambda: ogm_coefficients(torch.tensor(1.0), alpha=1.0), ValueError, r"label_prob must be of shape \[..., M\]"),
    (lambda: ogm_coefficients(P, alpha=1.0, present=P[0] > 0), ValueError, r"present must be of shape \[2, 2\]"),
    (lambda: GradientModulation([[torch.ones(2)]]), ValueError, r"parameters\[0\]\[0\] must be a leaf that requires"),
    (lambda: GradientModulation([[], []]), ValueError, "parameters must be at least one parameter"),
    (lambda: GradientModulation(iter([])), TypeError, "parameters must be a sequence of iterables"),
    (lambda: GradientModulation([nn.Linear(2, 2)], generator=3), TypeError, "generator must be a torch.Generator"),
    (lambda: GradientModulation([nn.Linear(2, 2)]).set(torch.ones(2)), ValueError, r"coefficients must be of shape"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), ERRORS, ids=[m for _, _, m in ERRORS])
def test_errors_of_balance(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()
