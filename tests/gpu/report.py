"""What `make gpu` writes of its journal: the evidence as one result file, and the last lines that are printed.

Predictions stand in docs/predictions.md, in a table with the columns kernel, shape, dtype, bound_us, simulated_us (in
any order, others are ignored). ``kernel`` is the name of an op, then any of: a backend, a divergence or another
option's value, ``labels``, ``forward``, ``backward``. A row belongs to a workload of that op, shape and dtype of which
it names nothing else; rows of a forward and a backward pass add up. Without the file there are no predictions.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from journal import GREEN, LEFT_OUT, RED, Journal

Line = dict[str, Any]
COLUMNS = ("kernel", "shape", "dtype", "bound_us", "simulated_us")
PASSES = frozenset({"forward", "backward"})
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
#: Of the report.
MOST_LINES, WIDTH = 60, 150


# ------------------------------------------------------------------------------------------------- predictions


def predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of the first table that has the columns; a time that is no number is None."""
    if not path.exists():
        return []
    head: list[str] | None = None
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip().startswith("|"):
            if head is not None:
                break
            continue
        cells = [cell.strip().strip("`").strip() for cell in line.strip().strip("|").split("|")]
        if head is None:
            head = cells if set(COLUMNS) <= set(cells) else None
        elif not set("".join(cells)) <= set("-: "):
            row = dict(zip(head, cells, strict=False))
            found.append({c: row.get(c, "") for c in COLUMNS[:3]} | {c: _number(row.get(c, "")) for c in COLUMNS[3:]})
    return found


def _number(text: str) -> float | None:
    match = re.search(r"\d+(?:\.\d+)?", text.replace(",", ""))
    return float(match[0]) if match else None


def predicted(rows: list[dict[str, Any]], workload: Line, backend: str) -> tuple[float | None, float | None]:
    """(bound, simulated) microseconds of a workload on a backend; None where nothing is said."""
    options = {**workload["options"]}
    known = {workload["op"], backend, *PASSES, *map(str, options.values())}
    known |= {"labels"} if options.get("hard_weight") else {"forward_kl"}
    needed = {str(v) for k, v in options.items() if k in ("divergence", "kind")}
    needed |= {"labels"} if options.get("hard_weight") else set()
    shape = workload["shape"]
    best: dict[frozenset[str], dict[str, Any]] = {}
    for row in rows:
        words = set(row["kernel"].replace(",", " ").split())
        dtype = SHORT_DTYPES.get(row["dtype"], row["dtype"])
        same = re.sub(r"\s*[×x]\s*", "x", row["shape"]) == shape and dtype == workload["dtype"]
        if same and workload["op"] in words and needed <= words <= known:
            best.setdefault(frozenset(words & PASSES), row)
    chosen = [best[frozenset()]] if frozenset() in best else list(best.values())

    def total(column: str) -> float | None:
        values = [row[column] for row in chosen]
        return sum(values) if values and None not in values else None

    return total("bound_us"), total("simulated_us")


# ---------------------------------------------------------------------------------------------------- evidence


def results_of(journal: Journal) -> list[Line]:
    """One result per workload: that of the comparison, which repeats what the first timing had, where there is one."""
    found = {name: line["result"] for name, line in journal.ended("speed").items() if "result" in line}
    found |= {name: line["result"] for name, line in journal.ended("compare").items() if "result" in line}
    return list(found.values())


def evidence(journal: Journal, checks: dict[str, Line], places: tuple[str, ...]) -> Line:
    """A result file of the benchmarks (schema 1) with ``checks``, and every sample. ``places`` are not named in it."""
    facts = journal.ended("facts")
    left = [
        {"name": name, "reason": line.get("why", "")}
        for part in ("speed", "compare")
        for name, line in journal.ended(part).items()
        if line["outcome"] == LEFT_OUT or (line["outcome"] == RED and "result" not in line)
    ]
    found = {
        "schema": 1,
        "machine": facts.get("machine", {}).get("result", {}),
        "ceilings": facts.get("ceilings", {}).get("result", {}),
        "suite": "gpu-first",
        "flush": True,
        "seconds": sum(check["seconds"] for check in checks.values()),
        "results": results_of(journal),
        "first_timings": [line["result"] for line in journal.ended("speed").values() if "result" in line],
        "left_out": left,
        "missing": {},
        "growth": None,
        "checks": checks,
    }
    return scrubbed(found, places)


def scrubbed(value: Any, places: tuple[str, ...]) -> Any:
    """Without the names of this machine's folders."""
    if isinstance(value, dict):
        return {k: scrubbed(v, places) for k, v in value.items()}
    if isinstance(value, list):
        return [scrubbed(v, places) for v in value]
    if isinstance(value, str):
        for place in places:
            value = value.replace(place, "…")
    return value


def check_of(journal: Journal, part: str, shares: Sequence[str], seconds: float, notes: list[str]) -> Line:
    """A part's counts and its reds, each with its reason."""
    ended = journal.ended(part)
    count = Counter(line["outcome"] for line in ended.values())
    total = journal.total(part, shares)
    left = None if total is None else max(total - sum("extra" not in line for line in ended.values()), 0)
    return {
        "verdict": "red" if count[RED] else "green" if left == 0 else "not finished",
        "green": count[GREEN],
        "red": count[RED],
        "left_out": count[LEFT_OUT],
        "not_reached": left,
        "seconds": round(seconds, 1),
        "notes": notes[:20],
        "why": {name: line.get("why", "") for name, line in ended.items() if line["outcome"] == RED},
    }


def save(found: Line, path: Path) -> None:
    """The whole file or none of it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


# ------------------------------------------------------------------------------------------------------ report

HEAD = (
    "workload",
    "on",
    "µs",
    "% copy",
    "host µs",
    "launches",
    "x eager",
    "x graph",
    "x compile",
    "x liger",
    "bound",
    "sim",
)


def table(found: Line, rows: list[dict[str, Any]]) -> list[str]:
    """A line for every workload and backend of ours."""
    copy = found["ceilings"].get("copy_gb_s")
    lines = [HEAD]
    for result in found["results"]:
        timed = {m["name"]: m for m in result["measurements"] if "median" in m}
        for name, own in timed.items():
            if not name.startswith("mfd_fast:") or name.endswith("+graph"):
                continue
            backend = name.removeprefix("mfd_fast:")
            us = 1e3 * own["median"]
            share = 100 * result["bytes"] / us / 1e3 / copy if copy else None
            ratios = [_ratio(timed.get(other), own) for other in ("eager", "eager+graph", "compile", "liger")]
            bounds = predicted(rows, result["workload"], backend)
            host = own["host"]["median"] * 1e3 if own.get("host") else None
            cells = [
                _short(us),
                _short(share),
                _short(host),
                _short(own.get("launches")),
                *map(_short, (*ratios, *bounds)),
            ]
            lines.append((result["workload"]["name"], backend, *cells))
    if len(lines) == 1:
        return []
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
    return [
        "  ".join(
            cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _ratio(other: Line | None, own: Line) -> float | None:
    return other["median"] / own["median"] if other else None


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def lines(found: Line, rows: list[dict[str, Any]], gone: str = "") -> list[str]:
    """At most ``MOST_LINES``: the machine, the table, the parts, then a line for every reason of reds."""
    machine, rates = found["machine"], found["ceilings"]
    said = [f"{machine.get('gpu', 'unknown GPU')}, torch {machine.get('torch')}, triton {machine.get('triton')}"]
    if rates:
        said.append(
            f"copy {rates['copy_gb_s']:.4g} GB/s, {rates['gemm_dtype']} GEMM "
            f"{rates['gemm_gflop_s'] / 1e3:.4g} TFLOP/s, empty call {rates['call_us']:.3g} µs"
        )
    said += table(found, rows)
    for part, check in found["checks"].items():
        left = "an unknown number" if check["not_reached"] is None else check["not_reached"]
        said.append(
            f"{part:<10} {check['verdict']:<13} {check['green']} green, {check['red']} red, "
            f"{check['left_out']} left out, {left} not reached, {check['seconds']:.0f} s"
        )
    if gone:
        said.append(f"STOPPED: {gone}")
    reasons: dict[str, list[str]] = {}
    for part, check in found["checks"].items():
        for name, why in check["why"].items():
            reasons.setdefault(f"{part}: {key_of(why)}", []).append(name)
    ranked = sorted(reasons.items(), key=lambda pair: -len(pair[1]))
    room = MOST_LINES - len(said) - 1
    for reason, names in ranked[:room]:
        said.append(f"RED {len(names)} x {reason}  [{names[0]}]"[:WIDTH])
    if len(ranked) > room:
        said.append(f"and {len(ranked) - room} reasons more: see the journal")
    return said[:MOST_LINES]


def key_of(why: str) -> str:
    """Of a reason, what reds of one kind share: the last line that says what was raised, without numbers."""
    raised = [line for line in why.splitlines() if re.match(r"E?\s*\w*(Error|Exception|assert|it |its |the )", line)]
    text = (
        (raised[-1] if raised else why.strip().splitlines()[-1] if why.strip() else "no reason")
        .removeprefix("E")
        .strip()
    )
    return re.sub(r"\d[\d.e+-]*", "#", text)[:100]
