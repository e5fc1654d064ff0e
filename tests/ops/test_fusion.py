"""What the fusion ops promise beyond the battery: sizes, many modalities, no copies, threads, schedules."""

import pytest
import torch
from draws import assert_draws_obey_rule
from harness import Result, assert_same, evaluate, on, reference64, requiring_grad, stacked
from op_db import RECORDS
from test_determinism import assert_repeats
from torch._dynamo.testing import CompileCounterWithBackend

import mfd_fast as mfd
from mfd_fast.backends import cpu
from mfd_fast.testing import modal_inputs

POOL, FEATURE, MFD = (RECORDS[name] for name in ("modal_pool", "feature_loss", "mfd_loss"))
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 127, 129, 257, 1000, 1025]


@pytest.mark.parametrize("modalities", [1, 2, 3, 4, 5, 17, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_number_of_modalities(modalities, dtype):
    def call_of(seed):
        features, query, bias, present = modal_inputs(5, modalities, 19, dtype=dtype, seed=seed)
        return {"features": features, "query": query, "bias": bias, "present": present}

    if dtype == torch.float64:
        found = stacked([evaluate(POOL, on(POOL, "cpu"), call_of(seed)) for seed in range(8)])
        exact = stacked([reference64(POOL, call_of(seed)) for seed in range(8)])
        assert_same(found, exact, "modalities", rtol=1e-12, atol=1e-13)
    else:
        assert_draws_obey_rule(POOL, "cpu", call_of, 8, f"{modalities} modalities")


def test_more_modalities_than_the_kernel_has_room_for():
    features = [torch.randn(2, 3) for _ in range(33)]
    with pytest.raises(
        mfd.BackendError, match=r"modal_pool: backend 'cpu' cannot run .*room for 32 modalities, not for 33"
    ):
        mfd.modal_pool(features, backend="cpu")
    assert mfd.explain(mfd.modal_pool, features).backend == "reference"
    assert mfd.modal_pool(features).weights.shape == (2, 33)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(n, 5) for n in (0, 1, 31, 32, 33, 65)] + [(2, d) for d in SIZES], ids=str)
@pytest.mark.parametrize("record", [POOL, FEATURE], ids=lambda r: r.name)
def test_fusion_sizes(record, shape, dtype):
    for name in record.samples():
        arguments = record.samples(dtype=dtype, rows=shape[0], classes=shape[1])[name]
        found = evaluate(record, on(record, "cpu"), arguments)
        exact = reference64(record, arguments)
        exact = Result(rounded_like(exact.outputs, found.outputs), rounded_like(exact.grads, found.grads))
        room = {torch.bfloat16: 2**-6, torch.float32: 3e-6, torch.float64: 1e-11}[dtype]
        assert_same(found, exact, name, rtol=room, atol=room)


def rounded_like(exact, found):
    return {k: v.to(found[k].dtype) for k, v in exact.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(70, 1030), (4100, 40), (3, 40001)], ids=str)
@pytest.mark.parametrize("record", [POOL, FEATURE], ids=lambda r: r.name)
def test_thread_count_does_not_change_a_bit(record, shape, dtype):
    before = torch.get_num_threads()
    try:
        for name, arguments in record.samples(dtype=dtype, rows=shape[0], classes=shape[1]).items():
            if "projector" in arguments:  # a library GEMM
                continue
            for names in (record.differentiable[:1], record.differentiable):
                found = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    found.append(evaluate(record, on(record, "cpu"), arguments, names=names))
                assert name
                for other in found[1:]:
                    assert_repeats(found[0], other)
    finally:
        torch.set_num_threads(before)


def test_stacked_features_are_read_where_they_lie_and_get_one_gradient():
    features = torch.randn(6, 3, 11)
    sliced = torch.randn(6, 4, 15)[:, 1:, 2:13]
    for stack in (features, sliced, features.transpose(0, 1).contiguous().transpose(0, 1)):
        call = {"features": stack, "query": torch.randn(11)}
        found = evaluate(POOL, on(POOL, "cpu"), call)
        apart = evaluate(POOL, on(POOL, "cpu"), {**call, "features": list(stack.unbind(1))})
        torch.testing.assert_close(found.outputs["pooled"], apart.outputs["pooled"])
        assert found.grads["features"].is_contiguous()
        for m in range(3):
            torch.testing.assert_close(found.grads["features"][:, m], apart.grads[f"features[{m}]"])


def test_one_tensor_in_two_roles():
    x = torch.randn(5, 7, requires_grad=True)
    for backend in ("cpu", "reference"):
        pooled = mfd.modal_pool([x, x, 2 * x], x[0], backend=backend).pooled
        (grad,) = torch.autograd.grad(pooled.square().sum(), x)
        again = mfd.modal_pool([x.double(), x.double(), 2 * x.double()], x[0].double(), backend="reference").pooled
        (exact,) = torch.autograd.grad(again.square().sum(), x)
        torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("end", ["pooled", "weights"])
def test_one_output_alone_backpropagates(end):
    for arguments in POOL.samples(dtype=torch.float64).values():
        grads = {}
        for backend in ("cpu", "reference"):
            own = requiring_grad(arguments, POOL.differentiable)
            value = getattr(mfd.modal_pool(**own, backend=backend), end)
            features = own["features"]
            leaves = [
                *(features if isinstance(features, list) else [features]),
                *(own[k] for k in POOL.differentiable[1:] if isinstance(own.get(k), torch.Tensor)),
            ]
            grads[backend] = torch.autograd.grad(value.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
        for a, b in zip(grads["cpu"], grads["reference"], strict=True):
            torch.testing.assert_close(a, b)


def test_a_mask_or_teacher_that_changes_before_it_is_read_again_is_noticed():
    x, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    mask, present = torch.ones(4, dtype=torch.bool), torch.ones(4, 2, dtype=torch.bool)
    pooled = mfd.modal_pool([x, 2 * x], present=present, backend="cpu").pooled
    rows = mfd.feature_loss(x, t, mask=mask, reduction="none", backend="cpu")
    whole = mfd.mfd_loss([x, 2 * x], None, torch.randn(5, 3), None, torch.randn(4, 5), backend="cpu").loss
    logits = torch.randn(4, 5)
    other = mfd.mfd_loss([x, 2 * x], None, torch.randn(5, 3), None, logits, backend="cpu").loss
    present[0] = mask[0] = False
    logits.zero_()
    for value in (pooled, rows, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.sum().backward()
    whole.backward()


def test_large_gradients_come_from_recycled_memory():
    features = [torch.randn(1024, 600).requires_grad_() for _ in range(2)]
    query = torch.randn(600, requires_grad=True)

    def step():
        torch.autograd.grad(mfd.modal_pool(features, query, backend="cpu").pooled.sum(), features)

    step()
    before = cpu.buffer_pool_stats()
    step()
    after = cpu.buffer_pool_stats()
    assert after.reused >= before.reused + 3
    assert after.mapped == before.mapped


@pytest.mark.parametrize("rows", [5, 64, 200])
def test_both_roads_of_mfd_loss_agree(rows):
    """The single pass, and the composition that serves every other argument that requires grad."""
    names = ("features", "query", "bias", "head_weight", "head_bias")
    for name in ("plain", "everything"):
        arguments = MFD.samples(rows=rows, classes=70)[name]
        one = evaluate(MFD, on(MFD, "cpu"), arguments, names=names)
        both = evaluate(MFD, on(MFD, "cpu"), arguments, names=(*names, "teacher_logits"))
        for key in both.grads:
            if key != "teacher_logits":
                torch.testing.assert_close(one.grads[key], both.grads[key], rtol=1e-4, atol=1e-6, msg=key)
        for key, value in both.outputs.items():
            torch.testing.assert_close(one.outputs[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(96, 300, 160), (64, 31, 512)], ids=str)
def test_mfd_loss_at_sizes_where_the_products_matter(dtype, shape):
    """Large enough for the gradients' products to run in bfloat16, and for several chunks of rows."""
    rows, classes, width = shape
    names = ("features", "query", "bias", "head_weight", "head_bias")

    def arguments_of(seed):
        arguments = dict(MFD.samples(dtype=dtype, rows=rows, classes=classes, seed=seed)["everything"])
        features, query, bias, _ = modal_inputs(rows, 3, width, dtype=dtype, seed=seed)
        rng = torch.Generator().manual_seed(seed)
        arguments["features"], arguments["query"], arguments["bias"] = features, query, bias
        arguments["head_weight"] = (torch.randn(classes, width, generator=rng) * width**-0.5).to(dtype)
        arguments["teacher_features"] = torch.randn(rows, width, generator=rng).to(dtype)
        return arguments

    without = ("predictions",)  # the argmax of rounded logits
    assert_draws_obey_rule(MFD, "cpu", arguments_of, 4, f"mfd_loss {shape}", without=without, names=names)


def test_predictions_are_the_first_argmax():
    features = [torch.tensor([[1.0], [1.0], [1.0], [1.0]])]
    head = torch.tensor([[2.0], [5.0], [5.0], [1.0]])
    for bias, expected in (([0.0] * 4, 1), ([0, 0, 0, torch.inf], 3), ([-torch.inf] * 4, 0), ([0, 0, torch.nan, 9], 2)):
        out = mfd.mfd_loss(features, None, head, torch.tensor(bias), torch.zeros(4, 4), backend="cpu")
        assert out.predictions.tolist() == [expected] * 4


@pytest.mark.parametrize(("record", "name"), [(POOL, "everything"), (MFD, "everything"), (FEATURE, "taps")])
def test_schedules_never_recompile(record, name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(on(record, "cpu"), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for step in range(4):
        arguments = dict(record.samples()[name])
        for key in ("temperature", "pool_temperature", "soft_weight", "feature_weight"):
            if key in arguments:
                arguments[key] = torch.tensor(0.5 + 0.25 * step)
        found = evaluate(record, lambda **k: record.outputs(call(**k)), arguments)
        expected = evaluate(record, on(record, "cpu"), arguments)
        for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, msg=key)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("backend", RECORDS["mfd_loss"].backends)
def test_a_term_of_weight_zero_is_reported_as_zero(backend, reduction):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(4, 5, generator=generator) for _ in range(2)]
    query, teacher = torch.randn(5, generator=generator), torch.randn(4, 3, generator=generator)
    head = torch.randn(3, 5, generator=generator).requires_grad_()
    arguments = (features, query, head, None, teacher, torch.tensor([0, 1, 2, 0]))
    options = {"reduction": reduction, "backend": backend}
    soft_alone = mfd.mfd_loss(*arguments, **options)
    hard_alone = mfd.mfd_loss(*arguments, divergence="nkd", soft_weight=0.0, hard_weight=0.7, **options)
    assert not bool(soft_alone.hard.any())
    assert bool(soft_alone.soft.any())
    assert not bool(hard_alone.soft.any())
    assert bool(hard_alone.hard.any())
