"""Tensors as training makes them: without memory, negative views, of inference mode, counts, and traced."""

import re

import pytest
import torch
from harness import evaluate, map_tensors, named_tensors, on, requiring_grad
from op_db import CASE_IDS, CASES, RECORDS, SAMPLE_CASES, SAMPLE_IDS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import masked_tensor
from torch.utils._pytree import tree_map

import mfd_fast as mfd

RICHEST = {"distill_loss": "labels", "distill_terms": "per_row", "feature_loss": "taps"}
RECORD_LIST = list(RECORDS.values())
NAMES = [r.name for r in RECORD_LIST]
each_record = pytest.mark.parametrize("record", RECORD_LIST, ids=NAMES)
each_case = pytest.mark.parametrize(("record", "backend"), CASES, ids=CASE_IDS)


def richest(record):
    return record.samples()[RICHEST.get(record.name, "everything")]


class Wrapped(torch.Tensor):
    """A tensor without memory of its own: it holds another one, on which PyTorch computes."""

    @staticmethod
    def __new__(cls, inner):
        meta = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        out = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **meta)
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def inner(x):
            return x.inner if isinstance(x, Wrapped) else x

        found = func(*tree_map(inner, args), **tree_map(inner, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, found)


def replaced(arguments, name, value):
    """``arguments`` with the tensor called ``name`` by named_tensors exchanged."""
    return map_tensors(arguments, lambda t: value if t is named_tensors(arguments)[name] else t)


@each_case
def test_fake_tensors_give_fake_results(record, backend):
    arguments = richest(record)
    expected = record.outputs(record.op(**arguments, backend=backend))
    with FakeTensorMode() as mode:
        fake = requiring_grad(map_tensors(arguments, mode.from_tensor), record.differentiable[:1])
        found = record.outputs(record.op(**fake, backend=backend))
        assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
        sum(v.sum() for v in found.values() if v.requires_grad).backward()
    leaves = [t for t in named_tensors(fake).values() if t.requires_grad]
    assert leaves
    assert all(t.grad.shape == t.shape for t in leaves)


@each_record
def test_real_tensors_under_fake_mode_are_named(record):
    arguments = richest(record)
    with FakeTensorMode(), pytest.raises(TypeError, match=rf"^{record.name}: \w+(\[0\])? must be a fake tensor"):
        record.op(**arguments)


@each_case
def test_freed_or_cut_storage_is_refused_by_name(record, backend):
    arguments = richest(record)
    for name, tensor in named_tensors(arguments).items():
        for left in (0, tensor.nbytes - 1):
            broken = tensor.clone()
            broken.untyped_storage().resize_(left)
            need = rf"^{record.name}: {re.escape(name.split('[')[0])}(\[\d+\])? must be a tensor with memory"
            with pytest.raises(TypeError, match=need):
                record.op(**replaced(arguments, name, broken), backend=backend)


@each_record
def test_a_subclass_that_pytorch_computes_gives_the_value_of_the_reference(record):
    arguments = richest(record)
    expected = record.outputs(record.op(**arguments, backend="reference"))
    for wrap in (Wrapped, lambda t: t):
        first = record.differentiable[0]
        given = {k: map_tensors(v, Wrapped) if k == first else map_tensors(v, wrap) for k, v in arguments.items()}
        assert mfd.explain(record.op, **given).backend == "reference"
        for name, value in record.outputs(record.op(**given)).items():
            assert torch.equal(value.inner if isinstance(value, Wrapped) else value, expected[name]), name


@each_case
def test_a_subclass_without_memory_is_refused_by_the_kernels(record, backend):
    if backend == "reference":
        return
    first = record.differentiable[0]
    given = {k: map_tensors(v, Wrapped) if k == first else v for k, v in richest(record).items()}
    with pytest.raises(mfd.BackendError, match=rf"{first}(\[0\])? is a Wrapped, which has no memory"):
        record.op(**given, backend=backend)


@pytest.mark.filterwarnings("ignore")
@each_record
def test_a_subclass_that_pytorch_cannot_compute_is_named(record):
    first = record.differentiable[0]
    masked = map_tensors(richest(record)[first], lambda t: masked_tensor(t, torch.ones_like(t, dtype=torch.bool)))
    with pytest.raises(TypeError, match=rf"^{record.name}: {first}(\[0\])? must be .* got MaskedTensor"):
        record.op(**{**richest(record), first: masked})


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize(("sample", "name"), [("ignored_term", "teacher_pool_weights"), ("no_teacher", "head_weight")])
def test_what_the_checks_of_mfd_loss_compute_with_is_named(sample, name):
    arguments = RECORDS["mfd_loss"].samples()[sample]
    masked = masked_tensor(arguments[name], torch.ones_like(arguments[name], dtype=torch.bool))
    with pytest.raises(
        TypeError, match=f"^mfd_loss: {name} must be a tensor that PyTorch can compute with, got Masked"
    ):
        mfd.mfd_loss(**{**arguments, name: masked})


@each_case
def test_uninitialized_parameters_are_named(record, backend):
    first = record.differentiable[0]
    lazy = map_tensors(richest(record)[first], lambda _: torch.nn.UninitializedParameter())
    with pytest.raises(TypeError, match=rf"^{record.name}: {first}(\[0\])? must be a tensor with values"):
        record.op(**{**richest(record), first: lazy}, backend=backend)


@pytest.mark.parametrize(("record", "backend", "name"), SAMPLE_CASES, ids=SAMPLE_IDS)
def test_negative_views_keep_their_sign(record, backend, name):
    arguments = record.samples(rows=4, classes=5)[name]

    def negative(t):
        return torch._neg_view(-t) if t.dtype.is_floating_point else t

    expected = evaluate(record, on(record, backend), arguments)
    found = evaluate(record, on(record, backend), map_tensors(arguments, negative))
    for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        assert torch.equal(a, b), key


@each_case
def test_a_negative_upstream_gradient_keeps_its_sign(record, backend):
    arguments = richest(record)

    def negative(output, seed):
        return torch._neg_view(torch.full_like(output, 0.5))

    def plain(output, seed):
        return torch.full_like(output, -0.5)

    for names in (record.differentiable[:1], record.differentiable):
        pair = [
            evaluate(record, on(record, backend), arguments, names=names, grad_outputs=g) for g in (negative, plain)
        ]
        for (key, a), (_, b) in zip(*(r.items() for r in pair), strict=True):
            assert torch.equal(a, b), key


@pytest.mark.parametrize(("record", "backend", "name"), SAMPLE_CASES, ids=SAMPLE_IDS)
def test_arguments_made_in_inference_mode(record, backend, name):
    """All but the one that is trained, as a teacher is run."""
    arguments = record.samples(rows=4, classes=5)[name]
    first = record.differentiable[:1]
    expected = evaluate(record, on(record, backend), arguments, names=first)
    with torch.inference_mode():
        others = map_tensors({k: v for k, v in arguments.items() if k not in first}, torch.clone)
    found = evaluate(record, on(record, backend), {**arguments, **others}, names=first)
    assert found.grads
    for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        assert torch.equal(a, b), key


SCALARS = {
    "distill_loss": ("temperature", "teacher_temperature", "soft_weight", "hard_weight", "normalizer"),
    "distill_terms": ("temperature", "teacher_temperature"),
    "linear_distill_loss": ("temperature", "teacher_temperature", "soft_weight", "hard_weight", "normalizer"),
    "modal_pool": ("temperature",),
    "feature_loss": ("weight",),
    "mfd_loss": (
        *("pool_temperature", "temperature", "soft_weight", "hard_weight"),
        *("feature_weight", "pool_weight", "normalizer"),
    ),
}


@each_case
def test_counts_are_numbers(record, backend):
    """A 0-d tensor of integers, as (labels != -100).sum() is."""
    arguments = richest(record)
    if record.name == "feature_loss":
        arguments = record.samples()["mse"]
    wrongs = torch.ones(5, dtype=torch.bool), torch.tensor([[3]])
    for name in SCALARS[record.name]:
        expected = record.outputs(record.op(**{**arguments, name: 3.0}, backend=backend))
        for dtype in (torch.int64, torch.int32, torch.uint8):
            given = {**arguments, name: torch.tensor(3, dtype=dtype)}
            for key, value in record.outputs(record.op(**given, backend=backend)).items():
                torch.testing.assert_close(value, expected[key], msg=f"{name} {key}")
        for wrong in (torch.tensor(True), *wrongs):
            with pytest.raises((TypeError, ValueError), match=rf"^{record.name}: {name}(\[0\])? must be"):
                record.op(**{**arguments, name: wrong}, backend=backend)


@each_record
def test_make_fx_records_the_registered_op(record):
    arguments = richest(record)
    first = record.differentiable[0]

    def call(value):
        return record.outputs(record.op(**{**arguments, first: value}))

    graph = make_fx(call)(arguments[first])
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any("mfd_fast" in t for t in targets)
    other = map_tensors(arguments[first], lambda t: t.flip(0))
    for key, value in graph(other).items():
        torch.testing.assert_close(value, call(other)[key], msg=key)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each_record
def test_jit_trace_is_refused(record):
    arguments = richest(record)
    first = record.differentiable[0]

    def call(*values):
        value = list(values) if isinstance(arguments[first], list) else values[0]
        return tuple(record.outputs(record.op(**{**arguments, first: value})).values())

    values = tuple(arguments[first]) if isinstance(arguments[first], list) else (arguments[first],)
    with pytest.raises(RuntimeError, match=rf"^{record.name}: torch.jit.trace cannot record"):
        torch.jit.trace(call, values)


@pytest.mark.parametrize(
    ("record", "backend"),
    [case for case in CASES if case[1] != "reference"],
    ids=[f"{r.name}-{b}" for r, b in CASES if b != "reference"],
)
def test_memory_freed_before_the_backward_is_named(record, backend):
    """As sharded training frees what it gathers: autograd notices nothing, a kernel would read what is not there."""
    arguments = map_tensors(next(iter(record.samples().values())), torch.clone)
    name = next(n for n, t in named_tensors(arguments).items() if t.dtype.is_floating_point)
    leaves = requiring_grad(arguments, record.differentiable)
    outputs = record.outputs(record.op(**leaves, backend=backend))
    ends = [value.sum() for value in outputs.values() if value.requires_grad]
    sum(ends).backward(retain_graph=True)  # of a scalar loss: gives away what the forward has computed
    named_tensors(leaves)[name].untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, TypeError), match=f"{name.partition('[')[0]}.* was freed"):
        sum(ends).backward()
