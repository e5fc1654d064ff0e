"""Plans of the GPU's backends, on the CUDA emulator and on Triton's interpreter: the same bits as the full checks."""

import pytest
import torch
from harness import map_tensors
from plan_calls import (
    CALLS,
    assert_same_bits,
    head,
    labelled,
    modalities,
    random,
    stacked,
    taps,
    tensors_in,
    with_parts,
)

import mfd_fast as mfd
from mfd_fast.backends import plans
from mfd_fast.backends.triton import program
from mfd_fast.testing import planned_calls, poison, without_plans

pytestmark = pytest.mark.skipif(plans.missing() is not None, reason="plans need PyTorch's C table")

BACKENDS = ("cuda", "triton")


def aligned_head():
    """A head that mfd_loss of CUDA reads without a copy."""
    shape = {"head_weight": (5, 8), "features": (6, 8), "query": (8,), "teacher_features": (6, 8)}
    found = head()
    for name, value in found.items():
        if name in shape:
            one = random(*shape[name], seed=len(name))
            found[name] = [one.clone(), one + 1] if isinstance(value, list) else one
    return {k: map_tensors(v, lambda t: t.requires_grad_()) if k in LEAVES else v for k, v in found.items()}


LEAVES = ("features", "query", "bias", "head_weight", "head_bias")
PLANNED = {
    "distill_loss": (mfd.distill_loss, labelled),
    "distill_loss of labels alone": (mfd.distill_loss, lambda: labelled() | {"soft_weight": 0.0}),
    "distill_loss with its parts": (mfd.distill_loss, with_parts),
    "feature_loss": (mfd.feature_loss, taps),
    "modal_pool": (mfd.modal_pool, modalities),
    "modal_pool of stacked features": (mfd.modal_pool, stacked),
    "mfd_loss": (mfd.mfd_loss, aligned_head),
}


@pytest.fixture(autouse=True)
def _planned(monkeypatch):
    monkeypatch.setattr(program, "of_interpreter", True)
    plans.forget()
    yield
    plans.forget()


def run(op, arguments, backend, scale=1.0):
    """Outputs and gradients of fresh leaves."""
    arguments = map_tensors(arguments, lambda t: t.detach().requires_grad_(t.requires_grad))
    outputs = tensors_in(op(**arguments, backend=backend))
    ends = [out for out in outputs if out.requires_grad]
    wanted = [t for t in tensors_in(list(arguments.values())) if t.requires_grad]
    upstream = [scale * random(*end.shape, seed=5) for end in ends[:1]]
    return [*outputs, *torch.autograd.grad(ends[:1], wanted, upstream, allow_unused=True)]


def checked(*call, **options):
    with without_plans():
        return run(*call, **options)


def hits_of(call):
    before = planned_calls()
    call()
    return planned_calls() - before


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("backend", "name"), [(b, n) for b in BACKENDS for n in PLANNED])
def test_the_second_call_of_a_backend_is_planned_and_equal(backend, name, scale):
    op, arguments = PLANNED[name]
    expected = checked(op, arguments(), backend, scale)
    for k in range(2):
        with poison():
            assert hits_of(lambda: assert_same_bits(run(op, arguments(), backend, scale), expected)) == k


CHANGES = [(name, argument) for name, call in CALLS.items() for argument in call[2] if argument != "backend"]


@pytest.mark.rest
@pytest.mark.parametrize(("backend", "name", "argument"), [(b, *c) for b in BACKENDS for c in CHANGES])
def test_a_backend_overlooks_no_change_of_one_argument(backend, name, argument):
    op, arguments, changes = CALLS[name]
    changed = arguments() | {argument: changes[argument]()}
    expected = checked(op, changed, backend)
    for _ in range(2):
        run(op, arguments(), backend)
    for _ in range(2):
        assert_same_bits(run(op, changed, backend), expected)
    assert_same_bits(run(op, arguments(), backend), checked(op, arguments(), backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 5])}, r"labels must be in \[0, 5\).*got 5 in row 5"),
        ({"temperature": float("nan")}, "temperature must be a finite number > 0"),
        ({"teacher_temperature": 1e30}, "teacher_temperature must be between"),
        ({"soft_weight": float("inf")}, "soft_weight must be a finite number"),
        ({"hard_weight": float("nan")}, "hard_weight must be a finite number"),
    ],
)
def test_a_backend_loses_no_message(backend, changes, message):
    for _ in range(2):
        run(mfd.distill_loss, labelled(), backend)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            mfd.distill_loss(**labelled() | changes, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_of_something_else_takes_the_checks(backend):
    """Both outputs of a pool, and some of its leaves."""

    def every_way():
        given = map_tensors(modalities(), lambda t: t.detach().requires_grad_(t.requires_grad))
        pooled, weights = mfd.modal_pool(**given, backend=backend)
        both = pooled.square().sum() + weights.square().sum()
        leaves = [*given["features"], given["query"], given["bias"]]
        found = torch.autograd.grad(both, leaves, retain_graph=True)
        return *found, *torch.autograd.grad(pooled.sum(), leaves[1:3], retain_graph=True)

    with without_plans():
        expected = every_way()
    for k in range(2):
        assert hits_of(lambda: assert_same_bits(every_way(), expected)) == k


@pytest.mark.parametrize("backend", BACKENDS)
def test_backwards_of_a_planned_loss(backend):
    """Twice, and differentiable again."""

    def every_way():
        given = labelled()
        loss = mfd.distill_loss(**given, backend=backend)
        first, second = (torch.autograd.grad(3 * loss, given["student"], retain_graph=True)[0] for _ in range(2))
        (recorded,) = torch.autograd.grad(loss, given["student"], create_graph=True)
        return first, second, recorded, torch.autograd.grad(recorded.square().sum(), given["student"])[0]

    with without_plans():
        expected = every_way()
    every_way()
    assert hits_of(lambda: assert_same_bits(every_way(), expected)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pointer_that_is_aligned_otherwise(backend):
    def at(offset):
        memory = torch.empty(6 * 8 + 4)
        student = memory[offset : offset + 48].view(6, 8).copy_(random(6, 8))
        return {"student": student.requires_grad_(), "teacher": random(6, 8, seed=1)}

    expected = [checked(mfd.distill_loss, at(offset), backend) for offset in (0, 1)]
    plans.forget()
    for offset in (0, 1, 0):
        given = at(offset)
        loss = mfd.distill_loss(**given, backend=backend)
        (gradient,) = torch.autograd.grad(loss, given["student"], random(seed=5))
        assert_same_bits([loss, gradient], expected[offset])
    # Triton compiles for alignments: the second call is another one.
    assert planned_calls() == (2 if backend == "cuda" else 1)
