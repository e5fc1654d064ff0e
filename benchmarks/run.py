"""Runs a suite with a progress bar, within its time, and says what it left out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mfd_fast.bench import ceilings, machine
from mfd_fast.bench.command import document
from mfd_fast.bench.implementations import every
from mfd_fast.bench.machine import DeviceLostError
from mfd_fast.bench.measure import LeftOutError, Settings, first_line, measure

from .suites import Entry, Suite

#: Why a workload is left out that another call with ``before`` measures.
LATE = "the suite's time was spent"
#: How the reason of a workload begins that raised what nobody expected.
FAILED = "it failed: "


def run_suite(
    suite: Suite,
    entries: Sequence[Entry],
    device: torch.device,
    *,
    against: Sequence[str] | None = None,
    seconds: float | None = None,
    minutes: float | None = None,
    compile_seconds: float | None = None,
    flush: bool = False,
    growth: Callable[[torch.device, Callable[[str], None]], list[dict[str, Any]]] | None = None,
    quiet: bool = False,
    before: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """A result file: the machine, the ceilings, one result per workload, and what was left out and why.

    ``before`` is the file of an earlier call that ran out of time: its results are kept, what is missing is measured.
    ``keep`` gets the file so far after every workload. Raises DeviceLostError: nothing more can be measured then.
    """
    begin = time.monotonic()
    facts, neighbours = machine.facts(device), machine.Neighbours()
    end = begin + 60 * (suite.minutes if minutes is None else minutes)
    compile_left = suite.compile_seconds if compile_seconds is None else compile_seconds
    found: list[dict[str, Any]] = [] if before is None else list(before["results"])
    left_out: list[dict[str, str]] = [] if before is None else [x for x in before["left_out"] if x["reason"] != LATE]
    settled = {result["workload"]["name"] for result in found} | {entry["name"] for entry in left_out}
    named = {name for entry in entries for name in (entry.against if against is None else against)}
    missing = {n: reason for n in sorted(named) if (reason := every()[n].missing(device)) is not None}

    def so_far() -> dict[str, Any]:
        return document(
            found,
            {**facts, "neighbours": neighbours.share()},
            rates,
            suite=suite.name,
            flush=flush or device.type == "cuda",
            seconds=round(time.monotonic() - begin, 1),
            left_out=left_out,
            missing=missing,
            growth=grown,
        )

    with _progress(quiet) as bar:
        task = bar.add_task(suite.name, total=len(entries) + (growth is not None))
        rates, grown = ceilings.measure(device, seconds=1.0 if suite.least < 5 else 3.0), None
        if growth is not None:
            grown = growth(device, lambda text: bar.update(task, description=text))
            bar.advance(task)
            end += time.monotonic() - begin
        for number, entry in enumerate(entries, 1):
            if entry.workload.name in settled:
                bar.advance(task)
                continue
            if quiet:  # a log instead of a bar
                said = f"{time.monotonic() - begin:6.1f} s  {number}/{len(entries)}  {entry.workload.name}"
                print(said, file=sys.stderr, flush=True)
            if time.monotonic() > end:
                left_out.append({"name": entry.workload.name, "reason": LATE})
                bar.advance(task)
                continue
            settings = Settings(
                device,
                entry.against if against is None else against,
                seconds=suite.seconds if seconds is None else seconds,
                least=suite.least,
                flush=flush,
                compile_seconds_left=compile_left,
                said=lambda text: bar.update(task, description=text),
            )
            try:
                found.append(measure(entry.workload, settings))
            except LeftOutError as reason:
                left_out.append({"name": entry.workload.name, "reason": str(reason)})
            except DeviceLostError:
                raise
            except Exception as error:
                left_out.append({"name": entry.workload.name, "reason": FAILED + first_line(error)})
            compile_left = settings.compile_seconds_left
            keep(so_far())
            bar.advance(task)
    return so_far()


class _NoBar:
    """Where a log is wanted, or rich is not installed."""

    def add_task(self, *_: Any, **__: Any) -> Any:
        return 0

    update = advance = add_task


def _progress(quiet: bool) -> contextlib.AbstractContextManager[Any]:
    if quiet:
        return contextlib.nullcontext(_NoBar())
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        transient=True,
    )
