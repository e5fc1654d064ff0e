"""The suite's table in the terminal, and the CSV file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mfd_fast.bench import results
from mfd_fast.bench.results import Result, milliseconds, number

COLUMNS = ("workload", "runs on", "mfd_fast", "floor", "x floor", "eager", "compile", "best other", "targets")


def cells(result: Result) -> list[str]:
    """One row. A speed-up below 1 says SLOWER; a red gate says RED and has no numbers."""
    name = result["workload"]["name"].removeprefix(result["workload"]["op"] + " ")
    own = results.primary(result)
    if own is None:
        return [name, result["backend"], "RED", *[""] * 5, "not judged"]
    ratio = {rival: results.speed_up(result, rival) for rival in ("eager", "compile")}
    floor = results.times_floor(result)
    return [
        name,
        result["backend"],
        milliseconds(own["median"]) + ("~" if results.is_noisy(own) else ""),
        milliseconds(results.floor_ms(result)),
        number(floor) if floor is not None else "",
        *(_ratio(ratio[rival]) for rival in ("eager", "compile")),
        best_other(result),
        targets(result),
    ]


def best_other(result: Result) -> str:
    """The fastest rival that is neither eager nor torch.compile."""
    others = [m for m in results.rivals(result) if m["name"] not in ("eager", "compile")]
    if not others:
        return ""
    best = min(others, key=lambda m: m["median"])
    return f"{best['name']} {_ratio(results.speed_up(result, best['name']))}"


def targets(result: Result) -> str:
    checks = results.targets(result)
    missed = [check for check in checks if check.met is False]
    if not checks:
        return ""
    if missed:
        return "missed: " + ", ".join(map(str, missed))
    return "met" if all(check.met for check in checks) else "not all measured"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{number(value)} x" + ("" if value >= 1 else " SLOWER")


def show(found: dict[str, Any], console: Console) -> None:
    """One table per op, red and slower rows in red, then what is missing."""
    ops = list(dict.fromkeys(r["workload"]["op"] for r in found["results"]))
    for op in ops:
        table = Table(title=f"{op}: medians; x = times as fast as", title_justify="left")
        for name in COLUMNS:
            left = name in ("workload", "runs on", "targets")
            table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name != "targets")
        for result in found["results"]:
            if result["workload"]["op"] == op:
                row = cells(result)
                bad = "RED" in row[2] or results.slower_than(result)
                table.add_row(*map(Text, row), style="red" if bad else None)
        console.print(table)
    for result in found["results"]:
        for m in results.red(result):
            console.print(Text(f"RED {result['workload']['name']}: {m['title']}: {m['red']}", style="bold red"))
    for grown in found["growth"] or []:
        console.print(Text(growth_line(grown), style="red" if "SUPER" in growth_line(grown) else "dim"))
    for name, reason in found["missing"].items():
        console.print(Text(f"missing    {name}: {reason}", style="dim"))
    for left in found["left_out"]:
        console.print(Text(f"left out   {left['name']}: {left['reason']}", style="yellow"))
    machine, rates = found["machine"], found["ceilings"]
    console.print(
        Text(
            f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, {machine['isa']}, "
            f"torch {machine['torch']}{results.busy(machine)}; stream {rates['stream_gb_s']:.3g} GB/s (in cache "
            f"{rates['cached_stream_gb_s']:.3g}), GEMM {rates['gemm_gflop_s']:.4g} GFLOP/s, call "
            f"{rates['call_us']:.3g} µs; {found['seconds']:.0f} s in all. '~': quartiles far apart."
        )
    )


def growth_line(grown: dict[str, Any]) -> str:
    from .growth import judgement, range_of

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    first, last = range_of(grown)
    return (
        f"growth     {grown['op']} with {grown['letter']} ({grown['axis']} {first} to {last}, {grown['backend']}): "
        f"time ^{shown(grown['time_exponent'])} (floor ^{shown(grown['floor_exponent'])}), memory "
        f"^{shown(grown['memory_exponent'])}: {judgement(grown)}"
    )


def write_csv(found: dict[str, Any], path: Path) -> None:
    """One line per implementation and workload, without the samples."""
    names = (
        "op", "shape", "dtype", "phase", "options", "implementation", "gate", "median_ms", "q1_ms", "q3_ms",
        "floor_ms", "times_floor", "mfd_fast_speed_up", "extra_bytes", "launches",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for result in found["results"]:
            load = result["workload"]
            options = " ".join(f"{key}={value}" for key, value in load["options"].items())
            for m in result["measurements"]:
                timed = "median" in m
                writer.writerow(
                    [
                        *(load[key] for key in ("op", "shape", "dtype", "phase")),
                        options,
                        m["name"],
                        m["gate"],
                        *((m["median"], m["q1"], m["q3"]) if timed else ("", "", "")),
                        results.floor_ms(result),
                        results.times_floor(result, m) if timed else "",
                        results.speed_up(result, m["name"]) if timed else "",
                        *((m["extra_bytes"], m["launches"]) if timed else ("", "")),
                    ]
                )
