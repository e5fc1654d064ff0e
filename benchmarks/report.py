"""docs/performance.md from raw result files and the profiles written beside them, and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mfd_fast.bench import results
from mfd_fast.bench.results import Result, mebibytes, milliseconds, number

from . import table
from .growth import judgement, range_of

COMMAND = "python -m benchmarks --suite {suite} --growth --publish"

Files = list[tuple[str, dict[str, Any]]]  # paths, seen from the document, and contents


def combined(found: dict[str, Any], more: Files) -> dict[str, Any]:
    """``found`` with the results of ``more`` in place of its own of the same workloads, or after them.

    A result that another instruction set gave says so in its name and replaces none. One of an op that has other sizes
    today is dropped.
    """
    today = {r["workload"]["op"]: list(r["workload"]["sizes"]) for _, other in more for r in other["results"]}
    kept = {
        result["workload"]["name"]: result
        for result in found["results"]
        if today.get(result["workload"]["op"]) in (None, list(result["workload"]["sizes"]))
    }
    left_out = {left["name"]: left for left in found["left_out"]}
    missing = dict(found["missing"])
    for _, other in more:
        isa = other["machine"]["isa"]
        mark = "" if isa == found["machine"]["isa"] else f" ({isa})"
        for result in other["results"]:
            name = result["workload"]["name"] + mark
            kept[name] = {**result, "workload": {**result["workload"], "name": name}}
            left_out.pop(name, None)
        left_out |= {left["name"] + mark: {**left, "name": left["name"] + mark} for left in other["left_out"]}
        missing |= other["missing"]
    return {**found, "results": list(kept.values()), "left_out": list(left_out.values()), "missing": missing}


def render(found: dict[str, Any], raw: str, pictures: list[str], more: Files | None = None, profiles: str = "") -> str:
    """Markdown; ``raw`` is the path of the result file and ``pictures`` those of the SVGs, seen from the document;
    ``more``: result files of other suites; ``profiles``: what was found out about the misses.
    """
    own, more = found, more or []
    found = combined(found, more)
    parts = [
        _head(own, raw),
        _further(more),
        _slower(found["results"]),
        _red(found["results"]),
        _missed(found["results"]),
        *(_op(found["results"], op) for op in dict.fromkeys(r["workload"]["op"] for r in found["results"])),
        _inside(found["results"]),
        profiles.strip(),
        _growth(found["growth"]),
        _pictures(pictures),
        _absent(found),
        _method(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: tuple[str, ...], rows: list[list[str]], left: int = 1) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "".join("---|" if i < left else "--:|" for i in range(len(head)))]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def _name(result: Result) -> str:
    return f"`{result['workload']['name']}`"


def _head(found: dict[str, Any], raw: str) -> str:
    machine, rates = found["machine"], found["ceilings"]
    share = machine["neighbours"]
    facts = [
        ["date", machine["date"]],
        ["commit", f"`{machine['commit']}`"],
        ["processor", f"{machine['cpu']}, {machine['cores']} logical processors, {_clock(machine)}"],
        ["threads", f"{machine['threads']}, instruction set {machine['isa']}"],
        [
            "taken by other processes meanwhile",
            "unknown" if share is None else f"{100 * share:.0f} % of the processors",
        ],
        [
            "environment",
            ", ".join(f"`{k}={v}`" for k, v in machine["environment"].items()) or "no variables that matter",
        ],
        ["last-level cache", mebibytes(machine["last_level_cache_bytes"])],
        ["versions", f"mfd_fast {machine['mfd_fast']}, torch {machine['torch']}, Python {machine['python']}"],
        ["other packages", _peers(machine)],
        [
            "stream (2 reads, 1 write)",
            f"{rates['stream_gb_s']:.3g} GB/s; in cache {rates['cached_stream_gb_s']:.3g} GB/s",
        ],
        ["copy", f"{rates['copy_gb_s']:.3g} GB/s"],
        [f"GEMM, {rates.get('gemm_dtype', 'float32')}", f"{rates['gemm_gflop_s']:.4g} GFLOP/s"],
        ["empty autograd call", f"{rates['call_us']:.3g} µs"],
    ]
    if "gpu" in machine:
        facts.insert(2, ["GPU", f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}"])
    command = COMMAND.format(suite=found["suite"])
    return (
        f"# Performance\n\nGenerated from [{Path(raw).name}]({raw}), which holds every sample.\n"
        f"To measure all of it again and write this page anew:\n\n```sh\n{command}\n```\n\n"
        f"At your own shape: `mfd-fast bench distill_loss --rows 8192 --classes 32000 --dtype bfloat16`.\n\n"
        + _table(("measured on", ""), facts, left=2)
    )


def _further(more: Files) -> str:
    if not more:
        return ""
    rows = []
    for raw, found in more:
        machine, share = found["machine"], found["machine"]["neighbours"]
        shapes: dict[str, dict[str, None]] = {}
        for result in found["results"]:
            shapes.setdefault(result["workload"]["op"], {})[result["workload"]["shape"]] = None
        rows.append(
            [
                "; ".join(f"`{op}` {', '.join(which)}" for op, which in shapes.items()),
                f"[{Path(raw).name}]({raw})",
                machine["date"],
                f"`{machine['commit']}`",
                f"{machine['isa']}, {machine['threads']} threads",
                "unknown" if share is None else f"{100 * share:.0f} %",
                f"{found['ceilings']['gemm_gflop_s']:.4g} GFLOP/s",
                f"`{_variables(machine)}python -m benchmarks --suite {found['suite']} --publish`",
            ]
        )
    head = ("workloads", "file", "date", "commit", "instruction set", "taken by others", "GEMM, float32", "command")
    return "These results come from files of their own:\n\n" + _table(head, rows, left=len(head))


def _variables(machine: dict[str, Any]) -> str:
    """What stood before the command."""
    return "".join(f"{name}={value} " for name, value in machine["environment"].items() if value != "a path")


def _clock(machine: dict[str, Any]) -> str:
    return "clock unknown" if machine["clock_mhz"] is None else f"{machine['clock_mhz']:.0f} MHz"


def _peers(machine: dict[str, Any]) -> str:
    there = [f"{name} {version}" for name, version in machine["peers"].items() if version]
    return ", ".join(there) or "none installed"


def _slower(found: list[Result]) -> str:
    rows = []
    for result in found:
        for name, ratio in results.slower_than(result):
            other, own = results.entry(result, name), results.primary(result)
            assert other is not None
            assert own is not None
            cells = [_name(result), result["backend"], other["title"], milliseconds(own["median"])]
            rows.append((ratio, [*cells, milliseconds(other["median"]), f"{number(ratio)} x"]))
    text = "## Slower than a rival\n\n"
    if not rows:
        return text + "Nothing here is slower than anything that it was measured against."
    rows.sort(key=lambda row: row[0])
    return text + _table(
        ("workload", "runs on", "rival", "mfd_fast", "rival's time", "mfd_fast is"), [row for _, row in rows], left=3
    )


def _red(found: list[Result]) -> str:
    rows = [[_name(result), m["title"], m["red"]] for result in found for m in results.red(result)]
    if not rows:
        return ""
    return (
        "## Red gates\n\nThese disagree with float64 by more than the tolerance rule allows (eight times that for "
        "other packages); no speed is reported for them.\n\n"
        + _table(("workload", "implementation", "why"), rows, left=3)
    )


def _missed(found: list[Result]) -> str:
    rows = [
        [
            _name(result),
            result["backend"],
            check.what,
            number(check.measured or 0),
            f"{'≥' if check.at_least else '≤'} {check.target:g}",
            "" if check.at_floor is None else number(check.at_floor),
        ]
        for result in found
        for check in results.targets(result)
        if check.met is False
    ]
    if not rows:
        return ""
    head = ("workload", "runs on", "what", "measured", "target", "at the floor")
    return (
        "## Missed targets\n\nAt the floor: what a call as fast as the floor would reach; a target above it cannot be "
        "met.\n\n" + _table(head, rows, left=3)
    )


def _op(found: list[Result], op: str) -> str:
    rows = []
    for result in found:
        if result["workload"]["op"] != op:
            continue
        own = results.primary(result)
        cells = [cell.replace("missed: ", "**missed**: ") for cell in table.cells(result)]
        wanted = {check.what: f"{'≥' if check.at_least else '≤'} {check.target:g}" for check in results.targets(result)}
        met = [check.met for check in results.targets(result)]
        memory = "" if own is None or own["extra_bytes"] is None else mebibytes(own["extra_bytes"])
        rows.append(
            [
                f"`{cells[0]}`",
                *cells[1:5],
                wanted.get("x floor", ""),
                cells[5],
                wanted.get("x eager", ""),
                cells[6],
                wanted.get("x torch.compile", ""),
                cells[7],
                memory,
                "" if not met else "**missed**" if False in met else "met" if all(met) else "not all measured",
            ]
        )
    head = ("workload", "runs on", "mfd_fast", "floor", "x floor", "target", "x eager", "target", "x compile", "target")
    return f"## {op}\n\n" + _table((*head, "best other", "peak extra", "targets"), rows, left=2)


def _inside(found: list[Result]) -> str:
    rows = []
    for result in found:
        ratio = results.inside(result)
        if ratio is None:
            continue
        times = [results.entry(result, name) for name in ("mfd_fast:inside", "compile")]
        own, target = results.primary(result), result["workload"]["targets"].get("inside")
        cells = [_name(result), *("" if m is None else milliseconds(m["median"]) for m in (*times, own))]
        rows.append([*cells, f"{number(ratio)} x", "" if target is None else f"≥ {target:g}"])
    if not rows:
        return ""
    return (
        "## Inside torch.compile\n\nA compiled function with the op in it, beside the same one in plain PyTorch.\n\n"
        + _table(("workload", "with the op", "without", "the op not compiled", "times as fast", "target"), rows)
    )


def _growth(grown: list[dict[str, Any]] | None) -> str:
    if not grown:
        return ""
    rows = [
        [
            f"`{one['op']}`",
            one["backend"],
            f"{one['letter']} ({one['axis']})",
            " … ".join(map(str, range_of(one))),
            *(
                "–" if one[key] is None else f"{one[key]:.2f}"
                for key in ("time_exponent", "floor_exponent", "memory_exponent")
            ),
            judgement(one),
        ]
        for one in grown
    ]
    head = ("op", "runs on", "grows", "from … to", "time ~ size^", "floor ~ size^", "memory ~ size^", "")
    return (
        "## Cost growth\n\nFitted exponents of forward + backward in float32 above three times the smallest cost.\n\n"
        + _table(head, rows, left=4)
    )


def _pictures(pictures: list[str]) -> str:
    return "\n\n".join(f"![{Path(path).stem}]({path})" for path in pictures)


def _absent(found: dict[str, Any]) -> str:
    lines = [f"- `{name}` is missing: {reason}" for name, reason in found["missing"].items()]
    lines += [f"- `{left['name']}` is left out: {left['reason']}" for left in found["left_out"]]
    for result in found["results"]:
        absent = {n: reason for n, reason in result["left_out"].items() if n not in found["missing"]}
        lines += [f"- `{name}` on {_name(result)}: {reason}" for name, reason in absent.items()]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


METHOD = """\
## How it is measured

Every implementation first passes a correctness gate against float64, with a far and with a near teacher; a red gate has
no speed. All implementations, the floor and an empty autograd call then run in turn, the order rotating; times are
medians. {flush}

`training` (the default) is forward and backward into fresh gradients; `forward` runs under `no_grad`. The floor is the
least traffic (inputs read once, outputs and gradients written once) at the speed of a three-array stream into memory
that exists, plus the GEMMs alone, or the empty autograd call where that takes longer. `~` marks medians whose quartiles
are more than a fifth of them apart. `reference` is plain PyTorch: an op that runs on it has no kernel for this device
yet. Peak extra is what one call holds beyond its inputs. A rival that starts from log-probabilities is charged for the
softmaxes and their backward, one without a temperature for the division by it."""


def _method(found: dict[str, Any]) -> str:
    return METHOD.format(
        flush="The last-level cache is flushed before every call." if found["flush"] else "No cache is flushed."
    )
