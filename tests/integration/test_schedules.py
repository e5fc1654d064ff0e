"""Schedules, CTKD's temperature, uncertainty weighting and dynamic weight average: values, state, no recompilation."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import mfd_fast as mfd
from mfd_fast.schedules import (
    Constant,
    Cosine,
    DynamicWeightAverage,
    LearnedTemperature,
    Linear,
    UncertaintyWeighting,
    Warmup,
    gradient_reversal,
)
from mfd_fast.testing import assert_bitwise_equal

SCHEDULES = {
    "constant": (lambda **o: Constant(4.0, **o), [4.0] * 6),
    "linear": (lambda **o: Linear(4.0, 2.0, 4, **o), [4.0, 3.5, 3.0, 2.5, 2.0, 2.0]),
    "cosine": (
        lambda **o: Cosine(4.0, 1.0, 4, **o),
        [1 + 3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)] + [1.0],
    ),
    "warmup": (lambda **o: Warmup(0.8, 4, **o), [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]),
    "warmup, then linear": (lambda **o: Warmup(Linear(2.0, 1.0, 2), 3, start=0.5, **o), [0.5, 1.0, 1.5, 2.0, 1.5, 1.0]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_values_and_one_tensor(name):
    make, expected = SCHEDULES[name]
    schedule = make()
    value = schedule.value
    assert value.shape == ()
    for k, number in enumerate(expected):
        assert schedule.last_step == k
        assert float(schedule) == schedule.at(k) == pytest.approx(number)
        torch.testing.assert_close(value, torch.tensor(number))
        assert schedule.step() is value
    assert schedule.step(1) is value
    torch.testing.assert_close(value, torch.tensor(expected[1]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_state_and_copies(name):
    make, expected = SCHEDULES[name]
    schedule = make()
    for _ in range(3):
        schedule.step()
    fresh = make()
    value = fresh.value
    fresh.load_state_dict(schedule.state_dict())
    assert fresh.value is value
    for twin in (fresh, pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin.value is not schedule.value
        twin.step()
        torch.testing.assert_close(twin.value, torch.tensor(expected[4]))
    assert schedule.last_step == 3
    assert f"{float(schedule):g} at step 3" in repr(schedule)
    wide = make(dtype=torch.float64, device="meta")
    assert (wide.value.dtype, wide.value.device.type) == (torch.float64, "meta")


def distillation_inputs():
    return torch.randn(6, 9, requires_grad=True), torch.randn(6, 9), torch.randint(9, (6,))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scheduled_loss_equals_numbers_and_never_recompiles(backend):
    """A module that was given the tensors once follows them, eager and compiled, forward and backward."""
    torch._dynamo.reset()
    student, teacher, labels = distillation_inputs()
    temperature, soft = Cosine(4.0, 1.0, steps=4), Warmup(0.9, steps=3)
    criterion = mfd.nn.DistillationLoss(
        temperature=temperature.value, soft_weight=soft.value, hard_weight=0.1, backend=backend
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    seen = set()
    for _ in range(5):
        numbers = {"temperature": float(temperature), "soft_weight": float(soft), "hard_weight": 0.1}
        expected = mfd.distill_loss(student, teacher, labels, **numbers, backend=backend)
        (grad,) = torch.autograd.grad(expected, student)
        for call in (criterion, compiled):
            loss = call(student, teacher, labels)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, student)[0], grad)
        seen.add(float(expected.detach()))
        temperature.step()
        soft.step()
    assert counter.frame_count == 1
    assert len(seen) == 5


def test_stepping_under_autograd_is_refused():
    schedule = Linear(2.0, 1.0, steps=2)
    x = torch.ones(3, requires_grad=True)
    y = (x * schedule.value).sum()
    schedule.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ------------------------------------------------------------------------------------------------ CTKD temperature


@pytest.mark.parametrize("coefficient", [0.0, 0.25, 1.0, torch.tensor(0.5)])
def test_gradient_reversal(coefficient):
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    up = torch.randn(50, dtype=torch.float64)
    y = gradient_reversal(x, coefficient)
    assert_bitwise_equal(y.detach() + 0.0, x.detach() + 0.0)
    y.backward(up)
    torch.testing.assert_close(x.grad, -float(coefficient) * up)


def test_learned_temperature_climbs_the_loss():
    """T = t_start + t_end·σ(θ); ∂L/∂θ is reversed: gradient descent raises the distillation loss."""
    student, teacher, _ = distillation_inputs()
    ramp = Cosine(0.0, 1.0, steps=10)
    module = LearnedTemperature(2.0, 5.0, theta=0.5, reversal=ramp)
    torch.testing.assert_close(module().detach(), torch.tensor(2.0 + 5.0 / (1 + math.exp(-0.5))))

    def theta_grad():
        module.zero_grad()
        mfd.distill_loss(student, teacher, temperature=module()).backward()
        return module.theta.grad.clone()

    assert float(theta_grad()) == 0.0
    ramp.step(10)
    plain = nn.Parameter(module.theta.detach().clone())
    mfd.distill_loss(student, teacher, temperature=2.0 + 5.0 * torch.sigmoid(plain)).backward()
    torch.testing.assert_close(theta_grad(), -plain.grad)
    ramp.step(5)
    torch.testing.assert_close(theta_grad(), -0.5 * plain.grad)
    ramp.step(10)
    before = float(mfd.distill_loss(student, teacher, temperature=module().detach()).detach())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(5):
        theta_grad()
        optimizer.step()
    assert float(mfd.distill_loss(student, teacher, temperature=module().detach()).detach()) > before


def test_learned_temperature_per_row_and_its_copies():
    student, teacher, _ = distillation_inputs()
    module = LearnedTemperature(reversal=0.5)
    theta = torch.randn(6, requires_grad=True)
    rows = module(theta)
    assert rows.shape == (6,)
    mfd.distill_loss(student, teacher, temperature=rows).backward()
    assert bool(theta.grad.all())
    assert set(module.state_dict()) == {"theta"}
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert_bitwise_equal(twin().detach(), module().detach())
    assert "t_start=1.0, t_end=20.0" in repr(module)
    assert module.double()().dtype == torch.float64


def test_learned_temperature_never_recompiles():
    torch._dynamo.reset()
    student, teacher, _ = distillation_inputs()
    ramp = Cosine(0.0, 1.0, steps=3)
    module = LearnedTemperature(reversal=ramp)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda s, t: mfd.distill_loss(s, t, temperature=module()), fullgraph=True, backend=counter)
    for _ in range(4):
        grads = []
        for call in (compiled, lambda s, t: mfd.distill_loss(s, t, temperature=module())):
            loss = call(student, teacher)
            grads.append(torch.autograd.grad(loss, (student, module.theta)))
        torch.testing.assert_close(*grads)
        with torch.no_grad():
            module.theta.add_(0.1)
        ramp.step()
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------------------------ weights of terms


def test_uncertainty_weighting():
    module = UncertaintyWeighting(3, dtype=torch.float64)
    assert_bitwise_equal(module.log_variance.detach(), torch.full((3,), -0.5, dtype=torch.float64))
    with torch.no_grad():
        module.log_variance.copy_(torch.tensor([-0.5, 0.3, 2.0]))
    losses = torch.tensor([2.0, 0.5, 7.0], dtype=torch.float64, requires_grad=True)
    s = module.log_variance.detach()
    total = module(losses)
    torch.testing.assert_close(total, (losses / (2 * s.exp()) + s / 2).sum())
    assert_bitwise_equal(module(list(losses.unbind())).detach(), total.detach())
    total.backward()
    torch.testing.assert_close(module.log_variance.grad, 0.5 * (1 - (-s).exp() * losses.detach()))
    torch.testing.assert_close(losses.grad, module.weights)
    assert torch.autograd.gradcheck(lambda x: module(x), (losses.detach().requires_grad_(),))
    twin = pickle.loads(pickle.dumps(module))
    assert_bitwise_equal(twin(losses).detach(), total.detach())
    assert set(module.state_dict()) == {"log_variance"}


def test_uncertainty_weighting_finds_the_optimum():
    """The minimum over s_i at constant losses is s_i = log L_i."""
    module = UncertaintyWeighting(2)
    losses = torch.tensor([0.5, 3.0])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        module(losses).backward()
        optimizer.step()
    torch.testing.assert_close(module.log_variance.detach(), losses.log(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_loss_that_stays_0_keeps_uncertainty_weighting_finite(dtype):
    """Its s_i falls without end; −30 (−11 in float16) is as low as it counts, and it comes back when the loss does."""
    module = UncertaintyWeighting(2, dtype=dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=10.0)
    x = torch.zeros(2, dtype=dtype, requires_grad=True)
    for _ in range(100):
        optimizer.zero_grad()
        total = module(x.square() + torch.tensor([0.0, 1.0], dtype=dtype))
        total.backward()
        optimizer.step()
        assert bool(torch.stack([total, *x.grad, *module.log_variance.grad]).isfinite().all())
    assert module.log_variance[0].item() < -400
    least = 11.0 if dtype == torch.float16 else 30.0
    assert float(module.weights[0]) == pytest.approx(math.exp(least) / 2, rel=1e-5)
    s = module.log_variance.detach()[1].to(total.dtype)
    torch.testing.assert_close(module(x.new_tensor([0.0, 1.0])).detach(), (torch.exp(-s) + s - least) / 2)
    module.zero_grad()
    module(torch.ones(2, dtype=dtype)).backward()
    assert module.log_variance.grad[0].item() < 0


def dwa_by_hand(history, temperature):
    if len(history) < 2:
        return torch.ones_like(history[0])
    return len(history[0]) * torch.softmax(history[-1] / history[-2] / temperature, 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_dynamic_weight_average(compiled):
    torch._dynamo.reset()
    module = DynamicWeightAverage(3, temperature=1.5)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(module, fullgraph=True, backend=counter) if compiled else module
    history, weights = [], torch.ones(3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        batches = torch.rand(4, 3, generator=generator) + 0.1
        for losses in batches:
            leaves = losses.clone().requires_grad_()
            total = call(leaves)
            torch.testing.assert_close(total, (weights * losses).sum())
            total.backward()
            torch.testing.assert_close(leaves.grad, weights)
        history.append(batches.mean(0))
        weights = module.step().clone()
        torch.testing.assert_close(weights, dwa_by_hand(history, 1.5))
    assert float(weights.sum()) == pytest.approx(3.0)
    assert counter.frame_count == compiled


def test_dynamic_weight_average_resumes():
    losses = torch.tensor([[1.0, 2.0], [0.5, 1.9], [0.4, 1.0]])
    whole, first = DynamicWeightAverage(2), DynamicWeightAverage(2)
    for module in (whole, first):
        for row in losses[:2]:
            module(row)
            module.step()
        module(losses[2])  # in the middle of an epoch
    second = DynamicWeightAverage(2)
    second.load_state_dict(first.state_dict())
    for module in (whole, second, pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
        module(losses[0])
        assert_bitwise_equal(module.step(), whole.weights)


def test_dynamic_weight_average_ignores_evaluation_and_losses_of_zero():
    module = DynamicWeightAverage(2)
    for losses in (torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])):
        module(losses)
        module.eval()(torch.tensor([100.0, 100.0]))
        module.train().step()
    torch.testing.assert_close(module.weights, 2 * torch.softmax(torch.tensor([0.25, 0.5]), 0))


# -------------------------------------------------------------------------------------------------------- errors

ERRORS = [
    (lambda: Constant("4"), TypeError, "Constant: amount must be a number"),
    (lambda: Constant(torch.tensor(4.0)), TypeError, "Constant: amount must be a number, got a float32 tensor"),
    (lambda: Linear(1.0, math.inf, 3), ValueError, "Linear: end must be a finite number"),
    (lambda: Linear(1.0, 2.0, 0), ValueError, "Linear: steps must be at least 1"),
    (lambda: Cosine(1.0, 2.0, 3.0), TypeError, "Cosine: steps must be an int"),
    (lambda: Warmup(None, 3), TypeError, "Warmup: after must be a number"),
    (lambda: Constant(1.0).step(-1), ValueError, "Constant: step must be at least 0"),
    (lambda: gradient_reversal(3.0), TypeError, "gradient_reversal: x must be a tensor"),
    (lambda: gradient_reversal(torch.ones(2), torch.ones(2)), ValueError, "coefficient must be a number or a 0-d"),
    (lambda: LearnedTemperature(0.0), ValueError, "LearnedTemperature: t_start must be a finite number > 0"),
    (lambda: LearnedTemperature(1.0, -1.0), ValueError, "t_end must be a finite number >= 0"),
    (lambda: LearnedTemperature(reversal="cosine"), TypeError, "reversal must be a number or a 0-d tensor"),
    (lambda: UncertaintyWeighting(0), ValueError, "UncertaintyWeighting: terms must be at least 1"),
    (lambda: UncertaintyWeighting(2)(torch.ones(3)), ValueError, "UncertaintyWeighting: losses must be 2 losses"),
    (lambda: UncertaintyWeighting(2)([torch.ones(2)] * 2), ValueError, r"losses\[0\] must be a 0-d tensor"),
    (lambda: UncertaintyWeighting(2)([1.0, 2.0]), TypeError, r"losses\[0\] must be a tensor"),
    (lambda: DynamicWeightAverage(2)(None), TypeError, "DynamicWeightAverage: losses must be a sequence"),
    (lambda: DynamicWeightAverage(2, temperature=0.0), ValueError, "temperature must be a finite number > 0"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), ERRORS, ids=[m for _, _, m in ERRORS])
def test_errors_of_schedules(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()
