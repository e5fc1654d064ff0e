"""The lines of the benchmarks that only a GPU takes, on a CPU that plays one (fake_cuda)."""

import dataclasses
import functools
import json

import fake_cuda
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import run, suites
from mfd_fast.bench import ceilings, gate, graphs, machine, measure, memory, results, timing
from mfd_fast.bench.ops import OPS
from mfd_fast.bench.workloads import Workload

GPU = torch.device("cuda")
SMALL = Workload("distill_loss", {"rows": 8, "classes": 50})


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(gate, "SEEDS", 2)
    monkeypatch.setattr(gate, "SMALL_BLOCK", 400)
    with fake_cuda.installed() as calls:
        yield calls


def test_the_device_sleeps_while_the_host_queues(gpu):
    step = functools.partial(torch.ones(64).add_, 1.0)
    times = timing.interleaved({"one": step}, GPU, 0.0, least=3)
    assert len(times["one"].samples) == 3
    assert gpu["_sleep"] == 3
    on_host = timing.host_times({"one": step}, GPU)
    assert len(on_host["one"].samples) == timing.HOST_ROUNDS
    assert all(x > 0 for x in on_host["one"].samples)


def test_a_sleep_is_as_long_as_the_host_needs(gpu, monkeypatch):
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(timing, "host_seconds", lambda step, device, calls=1: 1e-4)
    timing.interleaved({"one": lambda: None}, GPU, 0.0, least=2, flush=lambda: None)
    cycles = int(timing.HEAD_START * 1e-4 * timing.CYCLES_PER_SECOND)
    assert slept == [cycles, cycles]
    monkeypatch.setattr(timing, "host_seconds", lambda step, device, calls=1: 10.0)
    timing.interleaved({"one": lambda: None}, GPU, 0.0, least=1)
    assert slept[-1] == int(timing.MOST_SLEEP * timing.CYCLES_PER_SECOND)


def test_a_graph_is_warmed_up_captured_and_replayed(gpu):
    count = []
    replay = graphs.captured(lambda: count.append(1), GPU)
    assert len(count) == graphs.WARM_UPS + 1
    replay()
    assert gpu["replay"] == 1


@pytest.mark.rest
def test_a_workload_has_device_time_host_time_and_graphs(gpu):
    found = measure.measure(SMALL, measure.Settings(GPU, ("eager",), seconds=0.0, least=2, graphs=True))
    named = {m["name"]: m for m in found["measurements"]}
    assert set(named) == {"mfd_fast:cpu", "mfd_fast:cpu+graph", "eager", "eager+graph"}
    for entry in named.values():
        assert entry["median"] > 0
        assert entry["host"]["median"] > 0
    assert named["eager"]["launches"] == 0  # the profiler sees no kernel of a CPU
    assert named["eager+graph"]["launches"] is None
    assert results.rivals(found) == [named["eager"], named["eager+graph"]]
    assert gpu["empty_cache"] == 1
    json.dumps(found)


@pytest.mark.rest
def test_what_cannot_be_captured_is_named(gpu, monkeypatch):
    def refuses(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(measure, "captured", refuses)
    found = measure.measure(SMALL, measure.Settings(GPU, ("eager",), seconds=0.0, least=2, graphs=True))
    said = "it cannot be captured: RuntimeError: operation not permitted when stream is capturing"
    assert found["left_out"] == {"mfd_fast:cpu+graph": said, "eager+graph": said}


def raising(message, then=lambda: None):
    def call(options, backend):
        def f(**arguments):
            if backend == "cpu":
                then()
                raise RuntimeError(message)
            return OPS["topk_loss"].eager(**arguments)

        return f

    return call


def test_a_lost_device_ends_the_measurement(gpu, monkeypatch):
    broken = dataclasses.replace(OPS["distill_loss"], call=raising("an illegal memory access", fake_cuda.lose))
    exact = OPS["distill_loss"].call({**OPS["distill_loss"].options}, "reference")
    call = broken.call
    broken = dataclasses.replace(
        broken, call=lambda options, backend: exact if backend == "reference" else call(options, backend)
    )
    monkeypatch.setitem(OPS, "distill_loss", broken)
    with pytest.raises(machine.DeviceLostError, match=r"mfd_fast \(cpu\): RuntimeError: an illegal memory access"):
        measure.measure(SMALL, measure.Settings(GPU, ("eager",), seconds=0.0, least=2))


def test_the_ceiling_of_a_gpus_gemms_is_in_bfloat16(gpu):
    rates = ceilings.measure(GPU, seconds=0.0, scale=128)
    assert rates["gemm_dtype"] == "bfloat16"
    assert all(rates[name] > 0 for name in ("stream_gb_s", "copy_gb_s", "gemm_gflop_s", "call_us"))
    assert ceilings.measure(torch.device("cpu"), seconds=0.0, scale=128)["gemm_dtype"] == "float32"


def test_operands_of_a_gemm_are_random(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "mm", lambda left, right, out: seen.append((left, right)))
    ceilings.gemm_step(8, 8, 8, torch.bfloat16, GPU)()
    left, right = seen[-1]
    assert left.unique().numel() > 8
    assert right.unique().numel() > 8


def test_facts_and_memory_of_a_gpu(gpu):
    facts = machine.facts(GPU)
    assert (facts["gpu"], facts["gpu_memory_bytes"]) == (fake_cuda.NAME, 1 << 34)
    assert memory.peak_extra_bytes(lambda: None, GPU) == 1 << 20
    assert memory.available_bytes(GPU) == 1 << 34
    assert not machine.is_lost(GPU)
    fake_cuda.lose()
    assert machine.is_lost(GPU)


def suite(monkeypatch, measured):
    monkeypatch.setattr(run, "measure", measured)
    monkeypatch.setattr(ceilings, "measure", lambda *args, **options: {})
    entries = [suites.Entry(suites.distill(8, classes), ("eager",)) for classes in (10, 20, 30)]
    return dataclasses.replace(suites.QUICK, entries=tuple(entries))


def test_a_suite_keeps_every_workload_at_once_and_survives_an_exception(monkeypatch):
    def measured(workload, settings):
        if workload.sizes["classes"] == 20:
            raise AssertionError("nobody expected this\nat all")
        return {"workload": workload.as_json(), "measurements": [], "primary": "mfd_fast:cpu", "left_out": {}}

    chosen, kept = suite(monkeypatch, measured), []
    found = run.run_suite(
        chosen, chosen.entries, torch.device("cpu"), quiet=True, keep=lambda f: kept.append(json.dumps(f))
    )
    assert [len(json.loads(f)["results"]) for f in kept] == [1, 1, 2]
    assert found["left_out"] == [
        {"name": "distill_loss 8x20 float32", "reason": "it failed: AssertionError: nobody expected this"}
    ]
    assert command._status(found) == 1
    assert command._status({**found, "left_out": []}) == 0
    failing = {**found["results"][0], "left_out": {"mfd_fast:cpu": "it fails: RuntimeError: no"}}
    assert command._status({"results": [failing], "left_out": []}) == 1


def test_a_suite_stops_where_the_device_is_lost(monkeypatch):
    def measured(workload, settings):
        raise machine.DeviceLostError("gone")

    chosen = suite(monkeypatch, measured)
    with pytest.raises(machine.DeviceLostError):
        run.run_suite(chosen, chosen.entries, torch.device("cpu"), quiet=True)


def test_a_killed_writer_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    results.save({"schema": 1, "a": 1}, path)
    with pytest.raises(TypeError):
        results.save({"schema": 1, "a": object()}, path)
    assert results.load(path) == {"schema": 1, "a": 1}
