"""What the graph keeps, notices and lets transforms do: memory, changed arguments, hooks, checkpoints, torch.func."""

import gc
import weakref

import pytest
import torch
from harness import evaluate, map_tensors, named_tensors, on, requiring_grad
from op_db import CASE_IDS, CASES, RECORDS
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mfd_fast as mfd

RICHEST = {"distill_loss": "labels", "distill_terms": "per_row", "feature_loss": "taps"}
RECORD_LIST = list(RECORDS.values())
each_record = pytest.mark.parametrize("record", RECORD_LIST, ids=[r.name for r in RECORD_LIST])
each_case = pytest.mark.parametrize(("record", "backend"), CASES, ids=CASE_IDS)
#: The scalar pass, which computes its gradient in forward, and the pass that recomputes.
each_pass = pytest.mark.parametrize("wrt", ["first", "all"])


def richest(record):
    return map_tensors(record.samples()[RICHEST.get(record.name, "everything")], torch.clone)


def names_of(record, wrt):
    return record.differentiable[:1] if wrt == "first" else record.differentiable


def total(record, outputs):
    ends = record.outputs(outputs)
    return sum(ends[k].sum() for k in sorted(ends) if ends[k].requires_grad)


@each_pass
@each_case
def test_a_kept_loss_keeps_nothing_after_backward(record, backend, wrt):
    arguments = requiring_grad(richest(record), names_of(record, wrt))
    # What stands between the leaves and the op, as a model's activations do.
    moved = {k: map_tensors(v, lambda t: t * 1 if t.requires_grad else t) for k, v in arguments.items()}
    storages = [weakref.ref(t.untyped_storage()) for t in named_tensors(moved).values()]
    watched = [weakref.ref(t) for t in named_tensors(moved).values()]
    loss = total(record, record.op(**moved, backend=backend))
    loss.backward()
    del moved, arguments, storages
    gc.collect()
    assert loss.isfinite()
    assert [ref() for ref in watched if ref() is not None] == []


@each_pass
@each_case
def test_hooks_and_checkpoints_see_every_tensor(record, backend, wrt):
    """Packed away, a graph alone keeps no tensor; unpacked or computed again, it gives the same gradients."""
    arguments = richest(record)
    names = names_of(record, wrt)
    expected = evaluate(record, on(record, backend), arguments, names=names)
    box = {}

    def pack(t):
        box[len(box)] = t.detach().clone()
        return len(box) - 1

    with saved_tensors_hooks(pack, lambda k: box[k].clone()):
        hooked = evaluate(record, on(record, backend), arguments, names=names)
    assert box
    again = evaluate(
        record, lambda **a: checkpoint(on(record, backend), **a, use_reentrant=False), arguments, names=names
    )
    for found in (hooked, again):
        for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=key)


@each_case
def test_a_second_backward_is_the_same_and_may_be_scaled(record, backend):
    for names in (record.differentiable[:1], record.differentiable):
        arguments = requiring_grad(richest(record), names)
        leaves = [t for t in named_tensors(arguments).values() if t.requires_grad]
        loss = total(record, record.op(**arguments, backend=backend))
        first = torch.autograd.grad(2 * loss, leaves, retain_graph=True, allow_unused=True)
        kept = [None if g is None else g.clone() for g in first]
        second = torch.autograd.grad(2 * loss, leaves, allow_unused=True)
        for a, b, c in zip(kept, second, first, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
                assert torch.equal(a, c)


@each_pass
@each_case
def test_a_changed_argument_is_noticed_or_has_no_effect(record, backend, wrt):
    names = names_of(record, wrt)
    for name in named_tensors(richest(record)):
        arguments = requiring_grad(richest(record), names)
        leaves = [t for t in named_tensors(arguments).values() if t.requires_grad]
        loss = total(record, record.op(**arguments, backend=backend))
        first = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        changed = named_tensors(arguments)[name]
        with torch.no_grad():
            if changed.dtype.is_floating_point:
                changed.mul_(1.5)
            elif changed.dtype == torch.bool:
                changed.logical_not_()
            else:
                changed.copy_((changed + 1).clamp(0, 3))
        try:
            second = torch.autograd.grad(loss, leaves, allow_unused=True)
        except RuntimeError as error:
            assert "inplace" in str(error)  # noqa: PT017
            continue
        for a, b in zip(first, second, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, msg=name)


def masked_call():
    """Three rows, of which the last is masked and has NaN wherever a row has something of its own."""
    nan = float("nan")
    labels = torch.tensor([0, 1, -100])
    return {
        "student": torch.tensor([[1.0, 2.0], [0.5, 0.1], [nan, nan]]),
        "teacher": torch.tensor([[0.3, 1.0], [2.0, 0.1], [nan, nan]]),
        "labels": labels,
        "temperature": torch.tensor([1.0, 2.0, nan]),
        "weight": torch.tensor([1.0, 0.5, nan]),
        "soft_weight": torch.tensor(0.7),
        "hard_weight": torch.tensor(0.3),
    }


@pytest.mark.parametrize("backend", RECORDS["distill_loss"].backends)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_masked_row_has_no_effect_on_anything_learned(backend, reduction):
    record = RECORDS["distill_loss"]
    names = ("student", "teacher", "temperature", "weight", "soft_weight", "hard_weight")
    call = masked_call() | {"reduction": reduction}
    found = evaluate(record, on(record, backend), call, names=names)
    for key, value in found.items():
        assert value.isfinite().all(), key
    short = {k: v[:2] if torch.is_tensor(v) and v.dim() else v for k, v in call.items()}
    for name in ("soft_weight", "hard_weight"):
        expected = evaluate(record, on(record, backend), short, names=(name,), grad_outputs=lambda o, _: o * 0 + 1)
        value = evaluate(record, on(record, backend), call, names=(name,), grad_outputs=lambda o, _: o * 0 + 1)
        torch.testing.assert_close(value.grads[name], expected.grads[name])


@pytest.mark.parametrize("backend", RECORDS["mfd_loss"].backends)
def test_the_pool_temperature_of_a_masked_row_has_no_effect(backend):
    record = RECORDS["mfd_loss"]
    call = richest(record)
    rows = call["mask"].shape[0]
    for tau in (torch.full((rows,), 0.7), torch.where(call["mask"], 0.7, float("nan"))):
        result = evaluate(record, on(record, backend), {**call, "pool_temperature": tau})
        for key, value in result.items():
            assert value.isfinite().all(), key


# Those of PyTorch itself, which scripts derivatives of its operators.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each_record
def test_functional_gradients(record):
    """grad, jvp, jacobian and batched upstream gradients on the default backend, as the reference's."""
    arguments = richest(record)
    first = record.differentiable[0]
    several = isinstance(arguments[first], (list, tuple))
    leaf = arguments[first][0] if several else arguments[first]

    def value(x, backend=None):
        given = [x, *arguments[first][1:]] if several else x
        return total_of(record.outputs(record.op(**{**arguments, first: given}, backend=backend)))

    def total_of(outputs):
        return sum(v.sum() for v in outputs.values() if v.dtype.is_floating_point)

    x = leaf.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(x, "reference"), x)
    torch.testing.assert_close(torch.func.grad(value)(leaf), expected)
    primal, slope = torch.func.jvp(value, (leaf,), (torch.ones_like(leaf),))
    torch.testing.assert_close(primal, value(leaf, "reference"))
    torch.testing.assert_close(slope, expected.sum(), rtol=1e-4, atol=1e-5)
    for strategy in ("reverse-mode", "forward-mode"):
        jacobian = torch.autograd.functional.jacobian(value, leaf, vectorize=True, strategy=strategy)
        torch.testing.assert_close(jacobian, expected, rtol=1e-4, atol=1e-5)
    end = value(x)
    (batched,) = torch.autograd.grad(end, x, torch.tensor([1.0, 2.0]).to(end), is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([expected, 2 * expected]), rtol=1e-4, atol=1e-5)


@each_record
def test_vmap(record):
    """Over the first argument and, where there are some, over labels and the temperature."""
    arguments = richest(record)
    batched = [n for n in (record.differentiable[0], "labels", "temperature", "mask") if n in arguments]
    given = {
        n: map_tensors(arguments[n], lambda t: torch.stack([t, t.flip(0)]) if t.dim() else torch.stack([t, t * 2]))
        for n in batched
        if not isinstance(arguments[n], float)
    }

    def call(**parts):
        return record.outputs(record.op(**{**arguments, **parts}))

    found = torch.func.vmap(lambda parts: call(**parts))(given)
    for k in range(2):
        expected = call(**map_tensors(given, lambda t, k=k: t[k]))
        for name, value in expected.items():
            torch.testing.assert_close(found[name][k], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("teacher", ["dense", "listed"])
@pytest.mark.parametrize("ignored", ["row", "term"])
def test_rows_without_a_label_reach_no_shared_temperature_under_a_transform(ignored, teacher):
    """Where values are not looked at, a label that is ignored, or a list in a row without one, is not a bad one."""
    given = RECORDS["distill_loss"].samples(dtype=torch.float64)["labels"]
    arguments = {k: given[k] for k in ("student", "teacher", "labels", "mask")} | {"ignored_labels": ignored}
    if teacher == "listed":
        values, indices = given["teacher"].log_softmax(-1).topk(3, -1)
        exists = given["mask"] & (given["labels"] != -100) if ignored == "row" else given["mask"]
        arguments["teacher"] = mfd.TopK(values, torch.where(exists[:, None], indices, 10**6))

    def value(temperature):
        return mfd.distill_loss(**arguments, temperature=temperature, hard_weight=0.5)

    leaf = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(value)(leaf.detach()), expected)
    torch.testing.assert_close(torch.func.jvp(value, (leaf.detach(),), (torch.ones_like(leaf),))[1], expected)


def test_explain_says_why_no_kernel_runs_under_a_transform():
    x = torch.zeros(2, 3)
    reasons = []

    def value(s):
        reasons.append(mfd.explain(mfd.distill_loss, s, x).rejected["cpu"])
        return mfd.distill_loss(s, x)

    torch.func.grad(value)(x)
    assert "torch.func" in reasons[0]
