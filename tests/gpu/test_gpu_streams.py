"""The caller's stream, CUDA graphs, and a host that never waits."""

import pytest
import torch
from harness import assert_same, map_tensors
from on_device import ON_GPU, here
from op_db import RECORDS
from steps import CASES, IDS, OP_IDS, OPS, Captured, fill, no_waiting, placed, side_stream, step_of, wait

from mfd_fast.backends.cuda import launch

TIMES = 10 if ON_GPU else 1


@pytest.mark.parametrize(("record", "backend", "name"), CASES, ids=IDS)
@pytest.mark.parametrize("wrt", ["first", "all"])
def test_a_captured_step_replays_with_other_inputs(record, backend, name, wrt):
    names = record.differentiable[:1] if wrt == "first" else record.differentiable
    held = placed(record.samples(seed=0)[name])
    captured = Captured(step_of(record, backend, held, names))
    for seed in (1, 2):
        others = placed(record.samples(seed=seed)[name])
        fill(held, others)
        found = captured.replay()
        assert_same(found, step_of(record, backend, others, names)(), f"seed {seed}")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_graph_has_scratch_memory_of_its_own(backend):
    """Replayed while the same stream runs the op at another shape."""
    record = RECORDS["distill_loss"]
    many = 9000 if ON_GPU else 30
    held = placed(record.samples(rows=64 if ON_GPU else 8, classes=50)["labels"])
    captured = Captured(step_of(record, backend, held, ("student",)))
    expected = step_of(record, backend, held, ("student",))()
    other = step_of(record, backend, placed(record.samples(rows=many, classes=7)["labels"]), ("student",))
    alone = other()
    for _ in range(5):
        beside = other()
        found = captured.replay()
        assert_same(found, expected, "graph")
        assert_same(beside, alone, "beside it")


def unfilled(t):
    return torch.full_like(t, torch.nan) if t.dtype.is_floating_point else torch.zeros_like(t)


@pytest.mark.parametrize(("record", "backend", "name"), CASES, ids=IDS)
def test_work_is_queued_on_the_callers_stream(record, backend, name):
    """Inputs that this stream writes late: a launch on any other stream would read NaN."""
    arguments = placed(record.samples()[name])
    expected = step_of(record, backend, arguments)()
    late = map_tensors(arguments, unfilled)
    step = step_of(record, backend, late)
    fill(late, arguments)
    step()
    fill(late, map_tensors(arguments, unfilled))
    wait()
    with side_stream():
        fill(late, arguments)
        found = step()
    assert_same(found, expected, "side stream")


@pytest.mark.parametrize(("record", "backend"), OPS, ids=OP_IDS)
def test_two_streams_at_a_time(record, backend):
    """Scratch memory belongs to a stream."""
    name = next(iter(record.samples()))
    sizes = (300, 500) if ON_GPU else (3, 5)
    steps = [step_of(record, backend, placed(record.samples(rows=rows)[name])) for rows in sizes]
    expected = [step() for step in steps]
    wait()
    with side_stream():
        first = [steps[0]() for _ in range(TIMES)]
        with side_stream():
            second = [steps[1]() for _ in range(TIMES)]
        first += [steps[0]() for _ in range(TIMES)]
    for results, exact in ((first, expected[0]), (second, expected[1])):
        for found in results:
            assert_same(found, exact, "two streams")


@pytest.mark.parametrize(("record", "backend", "name"), CASES, ids=IDS)
def test_the_host_never_waits(record, backend, name):
    step = step_of(record, backend, placed(record.samples()[name]))
    step()
    with no_waiting():
        step()


@pytest.mark.parametrize(("record", "backend"), OPS, ids=OP_IDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_into_cuda_graphs(record, backend, monkeypatch):
    """torch.compile(mode="reduce-overhead"), whose warm-up is the first call that wants scratch memory."""
    torch._dynamo.reset()
    monkeypatch.setattr(launch, "_workspaces", {})
    plain = getattr(record.op, "unmoved", record.op)
    how = {"mode": "reduce-overhead"} if ON_GPU else {"backend": "aot_eager"}
    call = here(torch.compile(plain, fullgraph=True, **how))
    held = placed(next(iter(record.samples().values())))
    expected = step_of(record, backend, held)()
    for _ in range(4):  # a warm-up, a recording, two replays
        torch.compiler.cudagraph_mark_step_begin()
        found = step_of(record, backend, held, call=call)()
        assert_same(found, expected, "graphs", rtol=2e-5, atol=2e-6)
    torch._dynamo.reset()
