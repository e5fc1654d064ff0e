"""What a result says: ratios, targets, verdict. A result is the JSON object that :func:`.measure.measure` returns.

Everything that is printed, plotted or published is computed here from the raw file, never stored.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Measurement = dict[str, Any]

SCHEMA = 1
BUSY = 0.1
TITLES = {"eager": "eager", "compile": "torch.compile"}


def entry(result: Result, name: str) -> Measurement | None:
    """The measurement of one implementation, None if it was not timed (missing, left out, red)."""
    found = next((m for m in result["measurements"] if m["name"] == name), None)
    return found if found is not None and found["gate"] == "green" and "median" in found else None


def primary(result: Result) -> Measurement | None:
    """mfd_fast on the backend that the library picks (or that was asked for)."""
    return entry(result, result["primary"])


def rivals(result: Result) -> list[Measurement]:
    """Every timed implementation that is not mfd_fast."""
    names = [m["name"] for m in result["measurements"] if not m["name"].startswith("mfd_fast:")]
    return [m for m in (entry(result, name) for name in names) if m is not None]


def red(result: Result) -> list[Measurement]:
    return [m for m in result["measurements"] if m["gate"] == "red"]


def speed_up(result: Result, rival: str) -> float | None:
    """How many times as fast as ``rival`` the primary is; None without two green gates."""
    own, other = primary(result), entry(result, rival)
    return None if own is None or other is None else float(other["median"] / own["median"])


def times_floor(result: Result, measurement: Measurement | None = None) -> float | None:
    """Time over the floor; its reciprocal is the share of what the machine allows."""
    measurement = measurement or primary(result)
    return None if measurement is None else float(measurement["median"] / floor_ms(result))


def floor_ms(result: Result) -> float:
    """Stream and GEMMs as measured beside the op, or an empty autograd call where that takes longer."""
    return float(max(result["floor"]["median"], result["call"]["median"]))


def limited_by(result: Result) -> str:
    """``call``, ``gemm`` or ``memory``."""
    if result["call"]["median"] > result["floor"]["median"]:
        return "call"
    return "gemm" if result["flops"] > 8 * result["bytes"] else "memory"


def slower_than(result: Result) -> list[tuple[str, float]]:
    """(rival, speed-up < 1), the worst first."""
    found = [(m["name"], speed_up(result, m["name"])) for m in rivals(result)]
    return sorted(((name, s) for name, s in found if s is not None and s < 1), key=lambda pair: pair[1])


def is_noisy(measurement: Measurement) -> bool:
    """The quartiles are more than a fifth of the median away from each other."""
    return bool(measurement["q3"] - measurement["q1"] > 0.2 * measurement["median"])


@dataclass(frozen=True)
class TargetCheck:
    """``measured`` is None where it could not be measured. ``at_floor``: the speed-up of a call that takes as long as
    the floor: a target above it cannot be met.
    """

    what: str
    target: float
    measured: float | None
    at_least: bool
    at_floor: float | None = None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        got = "not measured" if self.measured is None else number(self.measured)
        return f"{self.what} {got} (target {sign} {self.target:g})"


def targets(result: Result) -> list[TargetCheck]:
    """Every target of the workload beside what was measured."""
    wanted, own = result["workload"]["targets"], primary(result)
    checks = []
    if wanted["floor"] is not None:
        checks.append(TargetCheck("x floor", wanted["floor"], times_floor(result), False))
    others = {name: wanted[name] for name in ("eager", "compile") if wanted[name] is not None}
    for name, least in (others | wanted.get("rivals", {})).items():  # results of before have no rivals
        rival = entry(result, name)
        at_floor = None if rival is None else float(rival["median"] / floor_ms(result))
        checks.append(TargetCheck(f"x {TITLES.get(name, name)}", least, speed_up(result, name), True, at_floor))
    if wanted["milliseconds"] is not None:
        checks.append(TargetCheck("ms", wanted["milliseconds"], own["median"] if own else None, False))
    if wanted["plain"] is not None:
        dtype = (result["workload"]["plain"] or {}).get("dtype")
        what = f"x {dtype}" if dtype else "x plain call"
        checks.append(TargetCheck(what, wanted["plain"], times_plain(result), False))
    if wanted.get("inside") is not None:
        checks.append(TargetCheck("inside torch.compile, x torch.compile", wanted["inside"], inside(result), True))
    if wanted.get("extra") is not None:
        held = None if own is None or own["extra_bytes"] is None else own["extra_bytes"] / 2**20
        checks.append(TargetCheck("peak extra, MiB", round(wanted["extra"] / 2**20, 1), held, False))
    return checks


def inside(result: Result) -> float | None:
    """How many times as fast torch.compile is with the op as without it."""
    own, other = entry(result, "mfd_fast:inside"), entry(result, "compile")
    return None if own is None or other is None else float(other["median"] / own["median"])


def times_plain(result: Result) -> float | None:
    own = primary(result)
    return None if own is None or result["plain"] is None else float(own["median"] / result["plain"]["median"])


def verdict(result: Result, neighbours: float | None = None) -> str:
    """One sentence: time, share of the limit, speed-ups; or why there are none.

    ``neighbours``: share of the processors that other processes took meanwhile. From ``BUSY`` on no factor is given:
    threads that wait for a processor which is taken make a call look hundreds of times as slow as it is. Where a
    quartile is far from the median a factor is a range, from quartile to quartile.
    """
    own = primary(result)
    if own is None:
        wrong = next((m for m in red(result) if m["name"] == result["primary"]), None)
        if wrong is not None:
            return f"WRONG: {wrong['title']} fails the correctness gate, so no speed is reported: {wrong['red']}"
        return f"mfd_fast was not measured: {result['left_out'].get(result['primary'], 'unknown reason')}."
    bound = {"memory": "its bytes at the speed of the memory", "gemm": "its GEMMs", "call": "an empty autograd call"}
    text = (
        f"{own['title']} takes {milliseconds(own['median'])}, {number(own['median'] / floor_ms(result))} times the "
        f"floor of {milliseconds(floor_ms(result))} ({bound[limited_by(result)]})"
    )
    return "; ".join([text, *_comparisons(result, own, neighbours or 0.0)]) + "."


def _comparisons(result: Result, own: Measurement, neighbours: float) -> list[str]:
    """Who is slower, who cannot be told apart, who is faster, and how surely that is known."""
    if neighbours >= BUSY:
        slower = [m["title"] for m in rivals(result) if m["median"] < own["median"]]
        others = [m["title"] for m in rivals(result) if m["median"] >= own["median"]]
        said = [f"SLOWER than {', '.join(slower)} in these runs"] if slower else []
        said += [f"faster than {', '.join(others)} in these runs"] if others else []
        because = f"other processes take {100 * neighbours:.0f} % of the processors"
        return [*said, f"by how much cannot be said while {because}"] if said else []
    lost, open_, won = [], [], []
    for m in rivals(result):
        ratio, low, high = m["median"] / own["median"], m["q1"] / own["q3"], m["q3"] / own["q1"]
        noisy = is_noisy(m) or is_noisy(own)
        factor = f"{number(low)} to {number(high)} x" if noisy else f"{number(ratio)} x"
        if noisy and low < 1 < high:
            open_.append(f"as fast as {m['title']} within the noise ({factor})")
        elif ratio < 1:
            lost.append(f"SLOWER than {m['title']} ({factor})")
        else:
            won.append(f"{factor} as fast as {m['title']}")
    return [*lost, *open_, *won]


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.3g} µs" if value < 0.1 else f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"


def number(value: float) -> str:
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:{'.2f' if value >= 0.1 else '.2g'}}"
    )


def mebibytes(nbytes: float) -> str:
    return f"{nbytes / 2**20:.0f} MiB" if nbytes >= 10 * 2**20 else f"{nbytes / 2**20:.2g} MiB"


def busy(machine: dict[str, Any]) -> str:
    """``, other processes took 37 % of the processors`` where it matters: times are then upper bounds."""
    share = machine.get("neighbours")
    return "" if share is None or share < 0.02 else f", other processes took {100 * share:.0f} % of the processors"


def check_writable(path: Path) -> None:
    """Raises OSError if :func:`save` could not write there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    with path.open("ab"):
        pass
    if not existed:
        path.unlink()


def save(found: dict[str, Any], path: Path) -> None:
    """Writes JSON with a line per entry, and per element of an entry that is a list: a workload is one line.

    The whole file or none of it: a process that is killed meanwhile leaves the former one.
    """

    def text(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    def entry(value: Any) -> str:
        return "[\n" + ",\n".join(map(text, value)) + "\n]" if isinstance(value, list) and value else text(value)

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{text(key)}: {entry(value)}" for key, value in found.items())
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    fresh.replace(path)


def load(path: Path) -> dict[str, Any]:
    """The contents of a result file; raises ValueError if it is none."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a result file of schema {SCHEMA}")
    return found


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
