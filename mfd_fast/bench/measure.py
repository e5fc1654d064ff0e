"""From a workload to a result: gate, floor, interleaved times, memory. A result is a JSON object (see ``results``)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import ceilings, memory
from .case import Case, as_dtype, build, step_of
from .gate import LENIENCE, Compute, Gate
from .graphs import captured
from .implementations import Implementation, UnfitError, backend_choices, every, mfd_fast_on
from .machine import DeviceLostError, is_lost, last_level_cache_bytes
from .ops import of, options_of
from .records import BenchOp
from .timing import LEAST_ROUNDS, Flusher, Step, Times, host_times, interleaved
from .workloads import DTYPES, Workload

# Inputs and gradients, eager's temporaries and the gate's copies, in multiples of the least traffic.
MEMORY_FACTOR = 7
PRIMARY_ALONE = ("eager", "compile")


@dataclass
class Settings:
    """``against``: names of other implementations; ``backend``: the only one of mfd_fast's to be measured.

    ``launches``: count kernels on a GPU, for which the profiler takes seconds to load. ``graphs``: mfd_fast and eager
    PyTorch on a GPU are also captured and replayed as CUDA graphs.
    """

    device: torch.device
    against: Sequence[str] = PRIMARY_ALONE
    backend: str | None = None
    seconds: float = 3.0
    least: int = LEAST_ROUNDS
    flush: bool = False
    launches: bool = True
    graphs: bool = False
    compile_seconds_left: float = float("inf")
    said: Callable[[str], None] = lambda _: None


class LeftOutError(Exception):
    """This workload is not measured here; the message says why."""


def measure(workload: Workload, settings: Settings, extra: dict[str, Implementation] | None = None) -> dict[str, Any]:
    """One result. Raises :class:`LeftOutError` and DeviceLostError; ``extra`` are further implementations (tests)."""
    try:
        return _measure(workload, settings, extra or {})
    except Exception as error:
        if memory.is_out_of_memory(error):
            raise LeftOutError(f"out of memory: {_needs(workload)}") from None
        raise
    finally:
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(workload: Workload, settings: Settings, extra: dict[str, Implementation]) -> dict[str, Any]:
    op, device = of(workload), settings.device
    work = op.work(dict(workload.sizes), workload.torch_dtype.itemsize, workload.phase == "training")
    _refuse_what_does_not_fit(workload, work, device)
    case = build(workload, device)
    try:
        chosen, others = backend_choices(case)
    except (TypeError, ValueError) as error:
        raise LeftOutError(str(error)) from None
    primary = settings.backend or chosen
    if settings.backend not in (None, chosen) and others[primary]:
        raise LeftOutError(f"backend {primary!r} cannot run this: {others[primary]}")
    backends = [primary]
    if settings.backend is None and primary != "reference":
        backends += [name for name, reason in others.items() if not reason and name not in ("reference", primary)]

    contestants = [mfd_fast_on(name) for name in backends]
    known = {**every(), **extra}
    contestants += [known[name] for name in settings.against]
    if any(contestant.compiles for contestant in contestants):  # else importing it takes longer than measuring
        torch._dynamo.reset()
    gate = Gate(workload, case)
    measurements: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    calls: dict[str, Compute] = {}
    for contestant in contestants:
        settings.said(f"{workload.name}: {contestant.title}")
        try:
            found = _admit(contestant, workload, settings, gate, calls)
        except UnfitError as reason:
            left_out[contestant.name] = str(reason)
            continue
        measurements.append(found)

    steps: dict[str, Step] = {name: step_of(call, case) for name, call in calls.items()}
    if settings.graphs:
        settings.said(f"{workload.name}: graphs")
        measurements += _as_graphs(steps, measurements, left_out, device)
    plain = _plain(workload, primary, case) if contestants[0].name in steps else None
    if plain is not None:
        steps["plain"] = plain
    steps["floor"] = ceilings.floor_step(work, workload.torch_dtype, device)
    steps["call"] = ceilings.call_step(device)
    flusher = Flusher(device, last_level_cache_bytes(device)) if settings.flush or device.type == "cuda" else None
    settings.said(f"{workload.name}: timing")
    times = interleaved(steps, device, settings.seconds, flush=flusher, least=settings.least)
    on_host = host_times(steps, device) if device.type == "cuda" else {}
    for entry in measurements:
        name = entry["name"]
        if name in steps:
            entry |= as_json(times[name])
            entry["host"] = as_json(on_host[name]) if name in on_host else None
        if name in calls:
            entry["extra_bytes"] = memory.peak_extra_bytes(steps[name], device)
            entry["launches"] = memory.launches(steps[name], device) if settings.launches else None
    return {
        "workload": workload.as_json(),
        "bytes": work.nbytes,
        "flops": work.flops,
        "primary": contestants[0].name,
        "backend": primary,
        "not_run": {name: reason for name, reason in others.items() if reason},
        "floor": as_json(times["floor"]),
        "call": as_json(times["call"]),
        "plain": as_json(times["plain"]) if plain is not None else None,
        "measurements": measurements,
        "left_out": left_out,
    }


def _as_graphs(
    steps: dict[str, Step], measurements: list[dict[str, Any]], left_out: dict[str, str], device: torch.device
) -> list[dict[str, Any]]:
    """Adds a replay to ``steps`` for each of ours and for eager; returns their entries."""
    found = []
    for entry in measurements:
        name = entry["name"]
        if name not in steps or not (name == "eager" or name.startswith("mfd_fast:")):
            continue
        try:
            steps[f"{name}+graph"] = captured(steps[name], device)
        except Exception as error:
            _raise_if_lost(device, f"capturing {entry['title']}", error)
            left_out[f"{name}+graph"] = f"it cannot be captured: {first_line(error)}"
            continue
        made = {"name": f"{name}+graph", "title": f"CUDA graph of {entry['title']}", "first_call_seconds": None}
        found.append({**entry, **made, "extra_bytes": None, "launches": None})
    return found


def _raise_if_lost(device: torch.device, what: str, error: BaseException) -> None:
    if is_lost(device):
        raise DeviceLostError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """``RuntimeError: what it says first``."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def as_json(times: Times) -> dict[str, Any]:
    low, high = times.quartiles
    return {"median": times.median, "q1": low, "q3": high, "samples": [round(x, 6) for x in times.samples]}


def _admit(
    contestant: Implementation, workload: Workload, settings: Settings, gate: Gate, calls: dict[str, Compute]
) -> dict[str, Any]:
    """Prepares and gates one implementation; it joins ``calls`` if the gate is green."""
    reason = contestant.missing(settings.device)
    if reason is not None:
        raise UnfitError(reason)
    if contestant.compiles and settings.compile_seconds_left <= 0:
        raise UnfitError("the time for compilations is spent (--compile-seconds)")
    call = contestant.prepare(workload, settings.device)
    begin = time.perf_counter()
    try:
        verdict = gate.check(call, lenience=_lenience(contestant, of(workload)), small=not contestant.compiles)
    except Exception as error:
        if memory.is_out_of_memory(error):
            raise UnfitError("out of memory") from None
        _raise_if_lost(settings.device, contestant.title, error)
        raise UnfitError(f"it fails: {first_line(error)}") from error
    spent = time.perf_counter() - begin
    if contestant.compiles:
        settings.compile_seconds_left -= spent
    if verdict.red is None:
        calls[contestant.name] = call
    return {
        "name": contestant.name,
        "title": contestant.title,
        "gate": "green" if verdict.red is None else "red",
        "red": verdict.red,
        "error": verdict.error,
        "eager_error": verdict.eager_error,
        "charged": contestant.charged,
        "first_call_seconds": round(spent, 3) if contestant.compiles else None,
    }


def _lenience(contestant: Implementation, op: BenchOp) -> float:
    return op.lenience if contestant.strict else LENIENCE


def _plain(workload: Workload, backend: str, case: Case) -> Step | None:
    """The simpler call of the same op that ``workload.plain`` names."""
    if workload.plain is None:
        return None
    options = {**options_of(workload), **workload.plain}
    dtype = options.pop("dtype", None)
    call = of(workload).call(options, backend)
    if dtype is not None:
        case = as_dtype(case, DTYPES[dtype])
    if options.get("hard_weight") or "labels" not in case.arguments:
        return step_of(call, case)
    without = Case(workload, {**case.arguments, "labels": None}, case.leaves, case.upstream, case.copies)
    return step_of(call, without)


def _refuse_what_does_not_fit(workload: Workload, work: ceilings.Work, device: torch.device) -> None:
    free = memory.available_bytes(device)
    if free is not None and MEMORY_FACTOR * work.nbytes > free:
        raise LeftOutError(f"{_needs(workload)}; {free / 2**30:.1f} GiB are free")


def _needs(workload: Workload) -> str:
    nbytes = of(workload).work(dict(workload.sizes), workload.torch_dtype.itemsize, True).nbytes
    return f"eager and the gate need about {MEMORY_FACTOR * nbytes / 2**30:.1f} GiB for {workload.shape}"
