"""Options that are tensors, parameters and schedules; checks at construction; reset after meta initialisation."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.loss import _Loss

import mfd_fast as mfd
from mfd_fast.schedules import Constant, DynamicWeightAverage, LearnedTemperature, Linear, UncertaintyWeighting
from mfd_fast.schedules.options import OptionsModule
from mfd_fast.testing import assert_bitwise_equal

STUDENT, TEACHER = torch.randn(5, 7), torch.randn(5, 7)
ROWS = [torch.randn(5, 4), torch.randn(5, 4)]


def parameter(value):
    return nn.Parameter(torch.tensor(value))


# ------------------------------------------------------------------------------------ registered with nn.Module

#: Module with one learned option, how to call it, and the function's value with the same option.
LEARNED = {
    "DistillationLoss temperature": (
        lambda t: mfd.nn.DistillationLoss(temperature=t),
        "temperature",
        lambda m: m(STUDENT, TEACHER),
        lambda t: mfd.distill_loss(STUDENT, TEACHER, temperature=t),
    ),
    "DistillationLoss soft_weight": (
        lambda t: mfd.nn.DistillationLoss(soft_weight=t, temperature=2.0),
        "soft_weight",
        lambda m: m(STUDENT, TEACHER),
        lambda t: mfd.distill_loss(STUDENT, TEACHER, soft_weight=t, temperature=2.0),
    ),
    "FeatureLoss weight": (
        lambda t: mfd.nn.FeatureLoss(weight=t),
        "weight",
        lambda m: m(STUDENT, TEACHER),
        lambda t: mfd.feature_loss(STUDENT, TEACHER, weight=t),
    ),
    "FeatureLoss weights": (
        lambda t: mfd.nn.FeatureLoss(weight=[0.5, t]),
        "weight.1",
        lambda m: m(ROWS, ROWS[::-1]),
        lambda t: mfd.feature_loss(ROWS, ROWS[::-1], weight=[0.5, t]),
    ),
    "MFDLoss pool_temperature": (
        lambda t: mfd.nn.MFDLoss(pool_temperature=t),
        "pool_temperature",
        lambda m: m(ROWS, ROWS[0][0], TEACHER.T[:, :4], None, TEACHER).loss,
        lambda t: mfd.mfd_loss(ROWS, ROWS[0][0], TEACHER.T[:, :4], None, TEACHER, pool_temperature=t).loss,
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_parameter_is_learned(name):
    build, key, call, function = LEARNED[name]
    value = parameter(1.5)
    module = build(value)
    assert dict(module.named_parameters()) == {key: value}
    assert isinstance(module, _Loss) or "Loss" not in name
    expected = function(value)
    found = call(module)
    assert_bitwise_equal(found.detach(), expected.detach())
    torch.testing.assert_close(*(torch.autograd.grad(v, value)[0] for v in (found, expected)))
    assert call(build(parameter(2.5))).item() != found.item()

    assert set(module.state_dict()) == {key}
    fresh = build(parameter(9.0))
    fresh.load_state_dict(module.state_dict())
    for twin in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_bitwise_equal(call(twin).detach(), found.detach())
        assert dict(twin.named_parameters())[key] is not value
    assert dict(module.double().named_parameters())[key].dtype == torch.float64
    assert "1.5" in repr(module)


@pytest.mark.parametrize("name", LEARNED)
def test_a_tensor_is_a_buffer(name):
    build, key, call, function = LEARNED[name]
    module = build(torch.tensor(1.5))
    assert not list(module.parameters())
    assert [n for n, _ in module.named_buffers()] == [key]
    assert set(module.state_dict()) == {key}
    assert_bitwise_equal(call(module), function(torch.tensor(1.5)))
    moved = copy.deepcopy(module).to("meta")
    assert dict(moved.named_buffers())[key].is_meta


def test_pool_fusion_and_learned_temperature_register_theirs():
    pool = mfd.nn.ModalPool(4, 2, temperature=parameter(2.0))
    assert [name for name, _ in pool.named_parameters()] == ["temperature", "query", "bias"]
    pool(ROWS).pooled.sum().backward()
    assert bool(pool.temperature.grad)
    fusion = mfd.nn.ModalFusion([4, 4], 3, temperature=parameter(2.0))
    assert "temperature" in dict(fusion.named_parameters())
    fusion(ROWS).pooled.sum().backward()
    assert bool(fusion.temperature.grad)
    learned = LearnedTemperature(reversal=torch.tensor(0.5))
    assert "reversal" in learned.state_dict()


def test_setting_an_option_later_changes_it():
    module = mfd.nn.DistillationLoss(temperature=2.0)
    for value in (3.0, parameter(4.0), torch.tensor(5.0), Constant(6.0), 7.0):
        module.temperature = value
        number = value.value if isinstance(value, Constant) else value
        assert_bitwise_equal(
            module(STUDENT, TEACHER).detach(), mfd.distill_loss(STUDENT, TEACHER, temperature=number).detach()
        )
        assert len(list(module.parameters())) == isinstance(value, nn.Parameter)
        assert len(list(module.buffers())) == (type(value) is torch.Tensor)
    module.divergence = "jsd"  # not among those of the constructor
    assert module.options == {"temperature": 7.0, "divergence": "jsd"}
    assert_bitwise_equal(
        module(STUDENT, TEACHER), mfd.distill_loss(STUDENT, TEACHER, temperature=7.0, divergence="jsd")
    )
    with pytest.raises(ValueError, match="DistillationLoss: temperature must be a finite number > 0"):
        module.temperature = -1.0
    assert module.temperature == 7.0


# ----------------------------------------------------------------------------------------------------- schedules


def at(temperature):
    return mfd.distill_loss(STUDENT, TEACHER, temperature=temperature)


@pytest.mark.parametrize("give", [lambda s: s, lambda s: s.value], ids=["schedule", "value"])
def test_copies_follow_a_schedule(give):
    schedule = Linear(4.0, 1.0, steps=3)
    module = mfd.nn.DistillationLoss(temperature=give(schedule))
    inner = nn.Sequential(module)
    twin = copy.deepcopy(inner)[0]
    schedule.step()
    for follower in (module, twin, copy.deepcopy(twin)):
        assert_bitwise_equal(follower(STUDENT, TEACHER), at(schedule.value))
        assert not follower.state_dict()


@pytest.mark.parametrize("give", [lambda s: s, lambda s: s.value], ids=["schedule", "value"])
@pytest.mark.parametrize("first", ["module", "schedule"])
def test_a_schedule_copied_with_its_module_is_the_copys(give, first):
    schedule = Linear(4.0, 1.0, steps=3)
    module = mfd.nn.DistillationLoss(temperature=give(schedule))
    if first == "module":
        twin, clock = copy.deepcopy((module, schedule))
    else:
        clock, twin = copy.deepcopy((schedule, module))
    clock.step()
    assert_bitwise_equal(twin(STUDENT, TEACHER), at(clock.value))
    assert_bitwise_equal(module(STUDENT, TEACHER), at(4.0))
    twin, clock = pickle.loads(pickle.dumps((module, schedule)))
    clock.step()
    assert_bitwise_equal(twin(STUDENT, TEACHER), at(clock.value))


def test_a_learned_temperatures_copy_follows_its_curriculum():
    ramp = Linear(0.0, 1.0, steps=2)
    module = LearnedTemperature(reversal=ramp)
    twin = copy.deepcopy(module)
    ramp.step()
    twin().backward()
    module().backward()
    assert bool(module.theta.grad)
    assert_bitwise_equal(twin.theta.grad, module.theta.grad)


def test_casting_a_module_leaves_its_schedule_alone():
    schedule = Linear(4.1, 1.0, steps=3)
    module = mfd.nn.DistillationLoss(temperature=schedule).bfloat16().half().to("meta").to("cpu")
    assert schedule.value.dtype == torch.float32
    schedule.step()
    assert_bitwise_equal(module(STUDENT, TEACHER), at(schedule.value))


# ------------------------------------------------------------------------------- reset after meta initialisation

MODULES = {
    "DistillationLoss": lambda: mfd.nn.DistillationLoss(temperature=2.0),
    "LinearDistillationLoss": lambda: mfd.nn.LinearDistillationLoss(temperature=2.0),
    "FeatureLoss": lambda: mfd.nn.FeatureLoss(projections=[(4, 6), None]),
    "MFDLoss": lambda: mfd.nn.MFDLoss(hard_weight=0.5),
    "ModalPool": lambda: mfd.nn.ModalPool(4, 2),
    "ModalFusion": lambda: mfd.nn.ModalFusion([4, 3], 5),
    "ModalFusion query": lambda: mfd.nn.ModalFusion([4, 3], 5, scoring="query"),
    "ModalFusion prior": lambda: mfd.nn.ModalFusion([4, 3], 5, scoring="prior", bias=False),
    "GatedFusion": lambda: mfd.nn.GatedFusion(4),
    "GatedFusion sigmoid": lambda: mfd.nn.GatedFusion(4, 3, kind="sigmoid"),
    "GatedFusion gmu": lambda: mfd.nn.GatedFusion(4, 3, kind="gmu"),
    "GatedFusion film": lambda: mfd.nn.GatedFusion(4, 3, kind="film"),
    "LowRankFusion": lambda: mfd.nn.LowRankFusion([4, 3], 5, rank=2),
    "ModalityDropout": lambda: mfd.nn.ModalityDropout(2, p=[0.5, 0.25], fill_features=[3, 4]),
    "LearnedTemperature": lambda: LearnedTemperature(theta=0.25),
    "UncertaintyWeighting": lambda: UncertaintyWeighting(3, log_variance=0.75),
    "DynamicWeightAverage": lambda: DynamicWeightAverage(3),
}


def test_every_module_is_among_them():
    public = [getattr(space, name) for space in (mfd.nn, mfd.schedules) for name in space.__all__]
    modules = {kind.__name__ for kind in public if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert modules == {name.split()[0] for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_reset_parameters_restores_every_tensor(name):
    build = MODULES[name]
    expected = build()
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    assert list(tensors) == list(dict([*expected.named_parameters(), *expected.named_buffers()]))
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(77)
    for one in (expected, module):
        torch.manual_seed(0)
        one.reset_parameters()
    for key, tensor in [*expected.named_parameters(), *expected.named_buffers()]:
        assert_bitwise_equal(tensors[key].detach(), tensor.detach())


def test_dropout_drops_after_meta_initialisation():
    with torch.device("meta"):
        drop = mfd.nn.ModalityDropout(2, p=0.5)
    drop.to_empty(device="cpu").reset_parameters()
    present = drop([torch.ones(1000, 1), torch.ones(1000, 1)]).present
    assert 600 < int((~present).sum()) < 900


def test_reset_gives_tensor_options_the_values_they_were_set_with():
    module = mfd.nn.DistillationLoss(temperature=parameter(2.0), soft_weight=torch.tensor(0.5))
    weights = mfd.nn.FeatureLoss(weight=[parameter(3.0), torch.tensor(0.25)])
    for one in (module, weights):
        one.to("meta").to_empty(device="cpu").reset_parameters()
    assert (module.temperature.item(), module.soft_weight.item()) == (2.0, 0.5)
    assert [weight.item() for weight in weights.options["weight"]] == [3.0, 0.25]
    with torch.device("meta"):
        unknown = mfd.nn.DistillationLoss(temperature=parameter(2.0))
    with pytest.raises(RuntimeError, match="DistillationLoss: temperature was set on the meta device"):
        unknown.to_empty(device="cpu").reset_parameters()


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to("cpu", torch.bfloat16)])
def test_casts_keep_counters_and_probabilities(cast):
    average, exact = cast(DynamicWeightAverage(2)), DynamicWeightAverage(2)
    for first in (1.0, 0.9):
        for step in range(400):
            losses = torch.tensor([first + step / 400, 2.0 - step / 400])
            average(losses)
            exact(losses)
        assert float(average.count) == 400
        assert_bitwise_equal(average.step(), exact.step())
    drop = cast(mfd.nn.ModalityDropout(2, p=[0.1, 1e-8], fill_features=[3, 3]))
    assert_bitwise_equal(drop.p, torch.tensor([0.1, 1e-8]))
    assert drop.fills[0].dtype != torch.float32
    assert DynamicWeightAverage(2, dtype=torch.bfloat16).count.dtype == torch.float32


def test_moving_still_moves_them():
    assert DynamicWeightAverage(2).to("meta").count.is_meta
    assert mfd.nn.ModalityDropout(2).bfloat16().to("meta").p.is_meta


# --------------------------------------------------------------------------------------------- device and dtype


@pytest.mark.parametrize(
    "build",
    [
        lambda **form: mfd.nn.ModalPool(4, 2, **form),
        lambda **form: mfd.nn.FeatureLoss(projections=[(4, 6), (3, 3)], **form),
    ],
    ids=["ModalPool", "FeatureLoss"],
)
def test_device_and_dtype(build):
    for p in build(device="meta", dtype=torch.bfloat16).parameters():
        assert (p.device.type, p.dtype) == ("meta", torch.bfloat16)


# ------------------------------------------------------------------------------------- checks at construction

WRONG = [
    (lambda: mfd.nn.DistillationLoss(temperature=0.0), ValueError, "DistillationLoss: temperature must be a finite"),
    (lambda: mfd.nn.DistillationLoss(temperature="4"), TypeError, "temperature must be a number or a 0-d tensor"),
    (lambda: mfd.nn.DistillationLoss(temperature=torch.tensor(-1.0)), ValueError, "temperature must be finite and > 0"),
    (lambda: mfd.nn.DistillationLoss(teacher_temperature=-1.0), ValueError, "teacher_temperature must be a finite"),
    (lambda: mfd.nn.DistillationLoss(divergence="kl"), ValueError, "divergence must be one of 'forward_kl'"),
    (lambda: mfd.nn.DistillationLoss(divergence=3), TypeError, "divergence must be a name or a Divergence"),
    (lambda: mfd.nn.DistillationLoss(soft_weight=None), TypeError, "soft_weight must be a number or a 0-d tensor"),
    (lambda: mfd.nn.DistillationLoss(hard_weight=torch.ones(2)), ValueError, "hard_weight must be a number or a 0-d"),
    (lambda: mfd.nn.DistillationLoss(label_smoothing=2.0), ValueError, r"label_smoothing must be in \[0, 1\]"),
    (lambda: mfd.nn.DistillationLoss(ignore_index=1.5), TypeError, "ignore_index must be an int"),
    (lambda: mfd.nn.DistillationLoss(student_transform=2.0), TypeError, "student_transform must be a LogitTransform"),
    (lambda: mfd.nn.DistillationLoss(teacher_transform="x"), TypeError, "teacher_transform must be a LogitTransform"),
    (lambda: mfd.nn.DistillationLoss(teacher_weights=[1.0]), TypeError, "teacher_weights must be a tensor"),
    (lambda: mfd.nn.DistillationLoss(scale_by_temperature=1), TypeError, "scale_by_temperature must be a bool"),
    (lambda: mfd.nn.DistillationLoss(reduction="batchmean"), ValueError, "DistillationLoss: reduction must be one of"),
    (lambda: mfd.nn.DistillationLoss(backend="gpu"), ValueError, "DistillationLoss: backend must be one of"),
    (lambda: mfd.nn.FeatureLoss(kind="l1"), ValueError, "FeatureLoss: kind must be one of 'mse'"),
    (lambda: mfd.nn.FeatureLoss(weight="1"), TypeError, "FeatureLoss: weight must be a number"),
    (lambda: mfd.nn.FeatureLoss(weight=[1.0, "1"]), TypeError, r"FeatureLoss: weight\[1\] must be a number"),
    (lambda: mfd.nn.FeatureLoss(projections=(4, 0)), ValueError, "FeatureLoss: projections must be at least 1"),
    (lambda: mfd.nn.FeatureLoss(projections=[(4,)]), TypeError, r"FeatureLoss: projections\[0\] must be \(student"),
    (lambda: mfd.nn.FeatureLoss(projections=[(4, 2.0)]), TypeError, r"FeatureLoss: projections\[0\] must be an int"),
    (lambda: mfd.nn.ModalPool(0, 2), ValueError, "ModalPool: dim must be at least 1"),
    (lambda: mfd.nn.ModalPool(4, 2.0), TypeError, "ModalPool: modalities must be an int"),
    (lambda: mfd.nn.ModalPool(4, 2, learn_query=1), TypeError, "ModalPool: learn_query must be a bool"),
    (lambda: mfd.nn.ModalPool(4, 2, temperature=-1.0), ValueError, "ModalPool: temperature must be a finite"),
    (lambda: mfd.nn.ModalPool(4, 2, scale="1"), TypeError, "ModalPool: scale must be a number or None"),
    (lambda: mfd.nn.MFDLoss(feature_kind="l1"), ValueError, "MFDLoss: feature_kind must be one of 'mse'"),
    (lambda: mfd.nn.MFDLoss(pool_weight="1"), TypeError, "MFDLoss: pool_weight must be a number"),
    (lambda: mfd.nn.MFDLoss(pool_temperature=0.0), ValueError, "MFDLoss: pool_temperature must be a finite"),
    (lambda: mfd.nn.ModalFusion([4], 3, temperature=torch.ones(2)), ValueError, "temperature must be a number or a"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), WRONG, ids=[m for _, _, m in WRONG])
def test_options_are_checked_when_the_module_is_built(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()


def test_every_option_has_a_check():
    for kind in (mfd.nn.DistillationLoss, mfd.nn.FeatureLoss, mfd.nn.ModalPool, mfd.nn.MFDLoss):
        assert issubclass(kind, OptionsModule)
        for name in kind._OPTIONS:
            with pytest.raises((TypeError, ValueError), match=f"{kind.__name__}: {name} "):
                setattr(kind(4, 2) if kind is mfd.nn.ModalPool else kind(), name, object())
