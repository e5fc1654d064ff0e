"""modal_pool and feature_loss on the CUDA kernels: every way in which threads share rows, odd memory, launches."""

import pytest
import torch
from draws import assert_draws_obey_rule
from harness import assert_same, evaluate, named_tensors, on, reference64, requiring_grad
from op_db import RECORDS
from test_values import narrowed

from mfd_fast.backends import cuda, plans
from mfd_fast.backends.cuda import feature_loss, modal_pool, scale
from mfd_fast.problems.pool import check_pool
from mfd_fast.testing import modal_inputs

POOL, FEATURE = RECORDS["modal_pool"], RECORDS["feature_loss"]
H100 = (90, 4, 232448)
KINDS = ("mse", "smooth_l1", "cosine")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture
def emulate():
    """Sets the emulated device: capability, processors, bytes of shared memory per block."""
    yield cuda.native().set_device
    cuda.native().set_device(*H100)


def launches(action):
    """What the action returns, and how many kernels it started."""
    before = cuda.native().launches()
    return action(), cuda.native().launches() - before


# Small shared memory makes short rows long ones: (device, width), parked, a block per row.
RUNGS = {
    "warp": (H100, 270, True, False),
    "block": (H100, 3003, True, True),
    "stream": ((80, 4, 8192), 701, False, True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_of_modal_pool_obeys_the_rule(emulate, rung, dtype):
    device, width, parked, whole = RUNGS[rung]
    emulate(*device)
    for name in POOL.samples():

        def call_of(seed, name=name):
            return POOL.samples(dtype=DTYPES[dtype], rows=4, classes=width, seed=seed)[name]

        problem = check_pool("modal_pool", call_of(0)["features"], call_of(0).get("query"))
        for backward in (False, True):
            assert modal_pool.plan(problem, backward)[:2] == (parked, whole)
        assert_draws_obey_rule(POOL, "cuda", call_of, 3, f"{rung} {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rung_of_feature_loss_obeys_the_rule(emulate, rung, kind, dtype):
    """The second tap is narrow: a warp works on its rows where a block does on those of the first."""
    device, width, *_ = RUNGS[rung]
    emulate(*device)

    def call_of(seed):
        return {**FEATURE.samples(dtype=DTYPES[dtype], rows=5, classes=2 * width, seed=seed)["taps"], "kind": kind}

    for names in (("student",), FEATURE.differentiable):
        assert_draws_obey_rule(FEATURE, "cuda", call_of, 2, f"{rung} {kind}", names=names)


@pytest.mark.parametrize("modalities", [1, 2, 4, 5, 32])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=str)
def test_any_number_of_modalities_on_cuda(modalities, dtype):
    def call_of(seed):
        features, query, bias, present = modal_inputs(5, modalities, 19, dtype=dtype, seed=seed)
        return {"features": features, "query": query, "bias": bias, "present": present}

    if dtype == torch.float64:
        for seed in range(2):
            found = evaluate(POOL, on(POOL, "cuda"), call_of(seed))
            assert_same(found, reference64(POOL, call_of(seed)), "modalities", rtol=1e-12, atol=1e-13)
    else:
        assert_draws_obey_rule(POOL, "cuda", call_of, 6, f"{modalities} modalities")


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (517, 1), (131, 7), (2, 8), (3, 9), (1, 4097)], ids=str)
def test_sizes_and_groups_that_walk_over_many_rows(emulate, shape):
    emulate(90, 1, 232448)
    rows, width = shape
    call = POOL.samples(rows=rows, classes=width)["query"]
    problem = check_pool("modal_pool", call["features"], call["query"])
    # No float32 sum over rows is longer than 32.
    assert modal_pool.plan(problem, True)[2] * 4 * 32 >= rows
    for record, samples in ((POOL, ("query", "scores")), (FEATURE, ("mse", "smooth_l1"))):
        for name in samples:
            call = record.samples(rows=rows, classes=width)[name]
            found = evaluate(record, on(record, "cuda"), call)
            assert_same(found, narrowed(reference64(record, call)), f"{name} {shape}", rtol=2e-5, atol=6e-6)


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("rung", RUNGS)
def test_features_that_are_not_aligned_on_cuda(emulate, rung, offset):
    """Odd widths and storage offsets: no 16-byte access is possible."""
    device, width, *_ = RUNGS[rung]
    emulate(*device)

    def moved(value):
        if isinstance(value, list):
            return [moved(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        return torch.cat([value.new_zeros(offset), value.flatten()])[offset:].view_as(value)

    for record, name in ((POOL, "query"), (FEATURE, "cosine")):
        call = record.samples(dtype=torch.bfloat16, rows=3, classes=width | 1)[name]
        found = evaluate(record, on(record, "cuda"), {k: moved(v) for k, v in call.items()})
        assert_same(found, evaluate(record, on(record, "cuda"), call), rung)


def test_each_tensor_keeps_its_dtype():
    """Nothing is converted beforehand, whatever the mixture."""
    features, query, bias, _ = modal_inputs(4, 3, 21)
    mixed = [features[0].bfloat16(), features[1].half(), features[2]]
    call = {"features": mixed, "query": query.double(), "bias": bias.half()}
    found = evaluate(POOL, on(POOL, "cuda"), call)
    assert {k: g.dtype for k, g in found.grads.items()} == {k: t.dtype for k, t in named_tensors(call).items()}
    expected = evaluate(POOL, on(POOL, "reference"), call)
    for (name, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-2 if b.itemsize == 2 else 2e-6, atol=1e-5)


def test_taps_of_unequal_dtypes_and_more_than_a_launch_holds():
    generator = torch.Generator().manual_seed(0)
    widths = [1 + 5 * k for k in range(19)]
    students = [torch.randn(3 + k % 4, w, generator=generator) for k, w in enumerate(widths)]
    dtypes = [torch.bfloat16, torch.float32] * 10
    teachers = [torch.randn(s.shape, generator=generator).to(d) for s, d in zip(students, dtypes, strict=False)]
    masks = [None if k % 3 else torch.arange(s.shape[0]) != 1 for k, s in enumerate(students)]
    call = {"student": students, "teacher": teachers, "mask": masks, "weight": [0.5 + k for k in range(19)]}
    for kind in KINDS:
        for reduction in ("mean", "sum"):
            own = {**call, "kind": kind, "reduction": reduction}
            found, count = launches(lambda own=own: evaluate(FEATURE, on(FEATURE, "cuda"), own, names=("student",)))
            # 16 taps, the rest, and the gradients' factor; the same by a plan.
            assert count == 3 * (1 if plans.missing() else 2)
            expected = evaluate(FEATURE, on(FEATURE, "reference"), own, names=("student",))
            assert_same(found, expected, kind, rtol=2e-5, atol=1e-5)


def test_masked_rows_are_counted_by_the_blocks_or_beforehand(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(1003, generator=generator) < 0.4
    call = {**FEATURE.samples(rows=1003, classes=2)["mse"], "mask": mask}
    first = evaluate(FEATURE, on(FEATURE, "cuda"), call, names=("student",))
    expected = evaluate(FEATURE, on(FEATURE, "reference"), call, names=("student",))
    assert_same(first, expected, "count", rtol=1e-5, atol=1e-8)
    monkeypatch.setattr(feature_loss, "COUNT_ROWS", 0)
    assert_same(evaluate(FEATURE, on(FEATURE, "cuda"), call, names=("student",)), first, "count")


def backward_launches(record, arguments, names):
    """Kernels of the forward pass and of the backward pass."""
    own = requiring_grad(arguments, names)
    outputs, forward = launches(lambda: record.outputs(record.op(**own, backend="cuda")))
    ends = [v for v in outputs.values() if v.requires_grad]
    # A factor of 1 on a CPU needs no launch; the kernel on a GPU looks at it.
    _, backward = launches(lambda: torch.autograd.backward(ends, [torch.full_like(v, 2.0) for v in ends]))
    return forward, backward


@pytest.mark.parametrize(
    ("record", "name", "names", "expected"),
    [
        (POOL, "query", ("features",), (1, 1)),
        (POOL, "scores", ("features", "scores", "temperature"), (1, 1)),
        (POOL, "everything", POOL.differentiable, (1, 2)),
        (FEATURE, "taps", ("student",), (1, 1)),  # the backward pass applies the upstream factor
        (FEATURE, "taps", FEATURE.differentiable, (1, 1)),
    ],
    ids=["features", "per row", "shared", "value and gradient", "both sides"],
)
def test_launches(record, name, names, expected):
    assert backward_launches(record, record.samples()[name], names) == expected


def test_scaling_of_many_gradients():
    gradients = [torch.full((k, 9), 0.5, dtype=d) for k, d in enumerate((*DTYPES.values(), torch.float64) * 25)]
    _, count = launches(lambda: scale.scale_gradients_(gradients, torch.tensor(3.0)))
    assert count == 2  # 64 and the rest
    assert all(bool((g == 1.5).all()) for g in gradients)
