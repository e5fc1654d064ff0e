"""The modules call the functions with their options, own only what they learn, and survive pickling."""

import copy
import io
import pickle

import pytest
import torch
from op_db import RECORDS
from torch.nn.modules.loss import _Loss

import mfd_fast as mfd
from mfd_fast.testing import assert_bitwise_equal

PER_CALL = {
    "distill_loss": ("mask", "weight", "normalizer"),
    "linear_distill_loss": ("student_bias", "teacher_bias", "mask", "weight", "normalizer"),
    "feature_loss": ("mask",),
    "mfd_loss": ("teacher_features", "present", "bias", "teacher_pool_weights", "mask", "weight"),
}
MODULES = {
    "distill_loss": mfd.nn.DistillationLoss,
    "linear_distill_loss": mfd.nn.LinearDistillationLoss,
    "feature_loss": mfd.nn.FeatureLoss,
    "mfd_loss": mfd.nn.MFDLoss,
}
POSITIONAL = {
    "distill_loss": ("student", "teacher", "labels"),
    "linear_distill_loss": ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "labels"),
    "feature_loss": ("student", "teacher"),
    "mfd_loss": ("features", "query", "head_weight", "head_bias", "teacher_logits", "labels"),
}
CASES = [(op, name) for op in MODULES for name, sample in RECORDS[op].samples().items() if "projector" not in sample]


def split(op, sample):
    sample = dict(sample)
    positional = [sample.pop(k, None) for k in POSITIONAL[op]]
    call = {k: sample.pop(k) for k in PER_CALL[op] if k in sample}
    return positional, call, sample


def value(result):
    return result.loss if isinstance(result, (mfd.DistillOutput, mfd.LinearDistillOutput, mfd.MFDOutput)) else result


@pytest.mark.parametrize(("op", "name"), CASES)
def test_module_equals_function_also_after_pickling(op, name):
    sample = RECORDS[op].samples()[name]
    positional, call, options = split(op, sample)
    module = MODULES[op](**options)
    assert isinstance(module, _Loss)
    assert not list(module.parameters())
    expected = value(RECORDS[op].op(**sample))
    for twin in (module, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert_bitwise_equal(value(twin(*positional, **call)), expected)
        assert twin.reduction == options.get("reduction", "mean")
    for key in options:
        assert key in repr(module)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_unknown_options_are_refused_at_construction(module):
    with pytest.raises(TypeError, match="no option 'sharpness'; known: "):
        module(sharpness=2.0)
    with pytest.raises(TypeError, match="no option 'mask'"):
        module(mask=None)


def test_feature_loss_learns_its_projectors():
    student = [torch.randn(6, 4), torch.randn(2, 3, 5)]
    teacher = [torch.randn(6, 7), torch.randn(2, 3, 5)]
    module = mfd.nn.FeatureLoss(projections=[(4, 7), None], kind="cosine")
    assert [tuple(p.shape) for p in module.parameters()] == [(7, 4)]
    loss = module(student, teacher)
    projector = next(module.parameters())
    expected = mfd.feature_loss(student, teacher, kind="cosine", projector=[projector, None])
    assert_bitwise_equal(loss.detach(), expected.detach())
    loss.backward()
    assert bool(projector.grad.any())
    single = mfd.nn.FeatureLoss(projections=(4, 7))
    assert single(student[0], teacher[0]).shape == ()
    twin = mfd.nn.FeatureLoss(projections=(4, 7))
    twin.load_state_dict(single.state_dict())
    assert_bitwise_equal(twin(student[0], teacher[0]).detach(), single(student[0], teacher[0]).detach())


@pytest.mark.parametrize(("learn_query", "learn_prior"), [(True, True), (True, False), (False, True)])
def test_modal_pool_module(learn_query, learn_prior):
    features = [torch.randn(4, 5) for _ in range(3)]
    present = torch.tensor([[True, True, False]] * 4)
    module = mfd.nn.ModalPool(5, 3, learn_query=learn_query, learn_prior=learn_prior, temperature=0.5)
    assert len(list(module.parameters())) == learn_query + learn_prior
    out = module(features, present)
    expected = mfd.modal_pool(features, module.query, bias=module.bias, present=present, temperature=0.5)
    assert_bitwise_equal(out.pooled.detach(), expected.pooled.detach())
    out.pooled.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with io.BytesIO() as file:
        torch.save(module.state_dict(), file)
        file.seek(0)
        twin = mfd.nn.ModalPool(5, 3, learn_query=learn_query, learn_prior=learn_prior, temperature=0.5)
        twin.load_state_dict(torch.load(file))
    assert_bitwise_equal(twin(features, present).pooled.detach(), out.pooled.detach())
    again = pickle.loads(pickle.dumps(module))
    assert_bitwise_equal(again(features, present).pooled.detach(), out.pooled.detach())
    assert "dim=5, modalities=3" in repr(module)


@pytest.mark.parametrize(
    "value",
    [
        mfd.ForwardKL(),
        mfd.LogitTransform(scale=0.5, softcap=3.0, classes=4),
        mfd.DistillTerms(*torch.zeros(7)),
        mfd.Choice("cpu", "why", {"triton": "no"}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_values_of_the_api_pickle_and_compare(value):
    twin = pickle.loads(pickle.dumps(value))
    assert type(twin) is type(value)
    assert repr(twin) == repr(value)
    if not isinstance(value, tuple):
        assert twin == value
    for name in getattr(type(value), "__annotations__", {}):
        with pytest.raises(AttributeError):
            setattr(value, name, 1)


def test_divergence_by_name_and_by_object_are_the_same():
    sample = RECORDS["distill_loss"].samples()["plain"]
    a, b = (mfd.distill_loss(**sample, divergence=d) for d in ("forward_kl", mfd.ForwardKL()))
    assert_bitwise_equal(a, b)
    assert mfd.ForwardKL().name == "forward_kl"
    assert isinstance(mfd.ForwardKL(), mfd.Divergence)
