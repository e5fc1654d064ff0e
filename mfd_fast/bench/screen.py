"""One result on one screen, with rich if it is installed and without it if not."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import textwrap
from typing import Any

from . import results
from .results import Result, milliseconds, number

COLUMNS = ("implementation", "gate", "median", "quartiles", "x floor", "mfd_fast is", "peak extra", "note")


def rows(result: Result, neighbours: float | None = None) -> list[tuple[str, ...]]:
    """The cells of every implementation: measured, red, left out. No factors on a busy machine."""
    busy = (neighbours or 0.0) >= results.BUSY
    found: list[tuple[str, ...]] = []
    for m in result["measurements"]:
        if m["gate"] == "red":
            found.append((m["title"], "RED", "", "", "", "", "", m["red"]))
            continue
        own = m["name"] == result["primary"]
        ratio = None if own else results.speed_up(result, m["name"])
        note = [f"compiled in {m['first_call_seconds']:.0f} s"] if m["first_call_seconds"] is not None else []
        note += ["noisy"] if results.is_noisy(m) else []
        note += [f"{m['launches']} launches"] if m["launches"] is not None else []
        found.append(
            (
                m["title"],
                "green",
                milliseconds(m["median"]),
                f"{milliseconds(m['q1'])} - {milliseconds(m['q3'])}",
                number(results.times_floor(result, m) or 0.0),
                "" if ratio is None else _factor(ratio, busy),
                "" if m["extra_bytes"] is None else results.mebibytes(m["extra_bytes"]),
                ", ".join(note),
            )
        )
    return found


def _factor(ratio: float, busy: bool) -> str:
    if busy:
        return "faster" if ratio >= 1 else "SLOWER"
    return f"{number(ratio)} x {'as fast' if ratio >= 1 else 'SLOWER'}"


def lines_below(result: Result, found: dict[str, Any]) -> list[str]:
    """Floor, targets, what is missing and why."""
    machine, ceilings = found["machine"], found["ceilings"]
    rate = result["bytes"] / result["floor"]["median"] / 1e6
    work = f"{result['bytes'] / 1e6:.4g} MB" + (f" and {result['flops'] / 1e9:.3g} GFLOP" if result["flops"] else "")
    lines = [
        f"floor      {milliseconds(result['floor']['median'])} for {work}"
        + ("" if result["flops"] else f", {rate:.3g} GB/s")
        + f"; an empty autograd call takes {milliseconds(result['call']['median'])}",
        f"ceilings   stream {ceilings['stream_gb_s']:.3g} GB/s, in cache {ceilings['cached_stream_gb_s']:.3g} GB/s, "
        f"GEMM {ceilings['gemm_gflop_s']:.4g} GFLOP/s",
        f"machine    {machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, {machine['isa']}, "
        f"torch {machine['torch']}{results.busy(machine)}",
    ]
    lines += [f"target     {check}: {'met' if check.met else 'MISSED'}" for check in results.targets(result)]
    lines += [f"left out   {name}: {reason}" for name, reason in result["left_out"].items()]
    lines += [f"not run    mfd_fast ({name}): {reason}" for name, reason in result["not_run"].items()]
    lines += [f"charged    {m['title']}: {m['charged']}" for m in results.rivals(result) if m["charged"]]
    return lines


def show(result: Result, found: dict[str, Any]) -> None:
    """Table, floor, verdict; ``found`` has the machine and the ceilings."""
    title = f"{result['workload']['name']}, {_phase(result)}"
    neighbours = found["machine"].get("neighbours")
    below, verdict = lines_below(result, found), results.verdict(result, neighbours)
    if importlib.util.find_spec("rich") is None:
        _show_plain(title, rows(result, neighbours), below, verdict)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        left = name in ("implementation", "gate", "note")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "note", overflow="fold")
    for row in rows(result, neighbours):
        bad = row[1] == "RED" or "SLOWER" in row[5]
        table.add_row(*map(Text, row), style="red" if bad else "bold" if row[0].startswith("mfd_fast") else None)
    console.print(table)
    for line in below:
        style = "red" if line.endswith("MISSED") else "dim"
        console.print(Text(line, style=style))
    bad = "WRONG" in verdict or "SLOWER" in verdict
    console.print(Text(verdict, style="bold red" if bad else "bold green"))


def _phase(result: Result) -> str:
    return "forward + backward" if result["workload"]["phase"] == "training" else "forward"


def _show_plain(title: str, cells: list[tuple[str, ...]], below: list[str], verdict: str) -> None:
    print(title)
    table = [COLUMNS, *cells]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS) - 1)]
    for row in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip())
    width = shutil.get_terminal_size((120, 24)).columns
    for line in [*below, verdict]:
        print(textwrap.fill(line, width, subsequent_indent=" " * 11))
