"""Three pictures of a result file, each as PNG and SVG: speed-up, position under the roof, growth."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from mfd_fast.bench import results
from mfd_fast.bench.results import Result

COLOURS = {"mfd_fast": "#d1603d", "eager": "#4c566a", "compile": "#8aa67a", "other": "#2e7fb8", "floor": "0.6"}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mfd_fast"  # the same data give the same file
    import matplotlib.pyplot as plt

    return plt


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the pictures that the file has data for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    timed = [r for r in found["results"] if results.primary(r) is not None]
    if timed:
        written += _save(_speed_up(timed), folder / "speed_up")
        written += _save(_roof(timed), folder / "roofline")
    if found["growth"]:
        written += _save(_growth(found["growth"]), folder / "scaling")
    return written


def _save(figure: Any, path: Path) -> list[Path]:
    plt = _pyplot()
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that a font lacks
        for target in paths:
            metadata = {"Date": None} if target.suffix == ".svg" else {"Software": None}
            figure.savefig(target, dpi=130, metadata=metadata)
    plt.close(figure)
    return paths


def _tidy(axis: Any, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="0.9")
    axis.set_axisbelow(True)


def _speed_up(timed: list[Result]) -> Any:
    """Bars on a log scale: how many times as fast mfd_fast is; below 1 it is slower."""
    plt = _pyplot()
    shown = [(r, [(n, s) for n in ("eager", "compile") if (s := results.speed_up(r, n)) is not None]) for r in timed]
    shown = [(result, ratios) for result, ratios in shown if ratios]
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.32 * max(len(shown), 1)), layout="constrained")
    for place, (_, ratios) in enumerate(shown):
        for number, (name, ratio) in enumerate(ratios):
            height = place + (number - (len(ratios) - 1) / 2) * 0.38
            axis.barh(height, ratio - 1, left=1, height=0.36, color=COLOURS[name], label=name)
            offset = 3 if ratio >= 1 else -3
            axis.annotate(
                f"{results.number(ratio)} x", (ratio, height), (offset, 0), textcoords="offset points",
                va="center", ha="left" if ratio >= 1 else "right", fontsize=7,
            )  # fmt: skip
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(range(len(shown)), [f"{r['workload']['name']} ({r['backend']})" for r, _ in shown], fontsize=7)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xlabel("times as fast as (ratio of medians; left of 1: slower)")
    _tidy(axis, "x")
    _legend(axis, {"eager": "eager PyTorch", "compile": "torch.compile"})
    return figure


def _roof(timed: list[Result]) -> Any:
    """Share of the limit against the limit itself: 1 is the roof that memory, GEMMs or the empty call set."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for result in timed:
        for m in result["measurements"]:
            if results.entry(result, m["name"]) is None:
                continue
            own = m["name"] == result["primary"]
            kind = "mfd_fast" if own else m["name"] if m["name"] in ("eager", "compile") else "other"
            if m["name"].startswith("mfd_fast:") and not own:
                continue
            axis.plot(
                results.floor_ms(result), 1 / (results.times_floor(result, m) or 1), "o", color=COLOURS[kind],
                ms=6 if own else 4, alpha=1.0 if own else 0.6, label=kind, zorder=3 if own else 2,
            )  # fmt: skip
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for formatter in (axis.xaxis, axis.yaxis):
        formatter.set_major_formatter("{x:g}")
    axis.set_xlabel("the least possible time on this machine, ms (measured: stream + GEMMs, or an empty autograd call)")
    axis.set_ylabel("least possible time / time taken")
    _tidy(axis, "both")
    _legend(
        axis, {"mfd_fast": "mfd_fast", "eager": "eager PyTorch", "compile": "torch.compile", "other": "other packages"}
    )
    return figure


def _growth(grown: list[dict[str, Any]]) -> Any:
    """Time against each size, with the floor below it."""
    plt = _pyplot()
    columns = min(4, len(grown))
    lines = -(-len(grown) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 2.9 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(grown) :]:
        axis.set_visible(False)
    for axis, one in zip(axes.flat, grown, strict=False):
        sizes = [p["size"] for p in one["points"]]
        axis.plot(sizes, [p["ms"] for p in one["points"]], "o-", color=COLOURS["mfd_fast"], ms=3, label="mfd_fast")
        axis.plot(sizes, [p["floor_ms"] for p in one["points"]], "--", color=COLOURS["floor"], label="floor")
        exponent = one["time_exponent"]
        slope = "" if exponent is None else f", ^{exponent:.2f}"
        axis.set_title(f"{one['op']} ({one['backend']}){slope}", fontsize=8)
        axis.set_xlabel(f"{one['letter']} ({one['axis']})", fontsize=8)
        axis.set_ylabel("ms", fontsize=8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.tick_params(labelsize=7)
        _tidy(axis, "both")
    axes[0][0].legend(frameon=False, fontsize=7)
    return figure


def _legend(axis: Any, titles: dict[str, str]) -> None:
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    names = [name for name in titles if name in handles]
    axis.legend([handles[n] for n in names], [titles[n] for n in names], frameon=False, loc="best", fontsize=8)
