"""The demo's picture: accuracies, the gain seed by seed, times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "teacher": "#4c566a",
    "distilled": "#d1603d",
    "alone": "#2e7fb8",
    "same_images": "#c9a227",
    "all_labels": "#8aa67a",
}
MARKERS = {"teacher": "s", "distilled": "o", "alone": "o", "same_images": "^", "all_labels": "v"}


def plot(found: dict[str, Any], titles: dict[str, str], path: Path) -> None:
    """Draws the contents of demo.json into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), width_ratios=(1.25, 1, 1.05), layout="constrained")
    _accuracies(axes[0], found, titles)
    _gains(axes[1], found)
    _times(axes[2], found)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _ticks(axis: Any, conditions: list[str]) -> None:
    axis.set_xticks(
        range(len(conditions)), [c.replace("without ", "no\n").replace(" sensors", "\nsensors") for c in conditions]
    )
    axis.set_xlim(-0.5, len(conditions) - 0.5)
    axis.grid(axis="y", color="0.9")


def _accuracies(axis: Any, found: dict[str, Any], titles: dict[str, str]) -> None:
    conditions = list(found["summary"]["teacher"])
    arms = [arm for arm in MARKERS if arm in found["summary"]]
    for number, arm in enumerate(arms):
        numbers = [found["summary"][arm][c] for c in conditions]
        axis.errorbar(
            [i + (number - (len(arms) - 1) / 2) * 0.13 for i in range(len(conditions))],
            [100 * n["mean"] for n in numbers],
            [100 * (n["standard_error"] or 0.0) for n in numbers],
            fmt=MARKERS[arm], color=COLOURS[arm], capsize=3, markersize=6 if number < 3 else 4.5, label=titles[arm],
        )  # fmt: skip
    _ticks(axis, conditions)
    axis.set_ylabel("test accuracy (%)")
    axis.set_title(f"Accuracy, mean ± standard error of {len(found['seeds'])} seeds")
    axis.legend(loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.5, -0.14))


def _gains(axis: Any, found: dict[str, Any]) -> None:
    gains = found["paired"]["distilled - alone"]
    for place, gain in enumerate(gains.values()):
        count = len(gain["differences"])
        across = [place - 0.18 + 0.36 * (k + 0.5) / count for k in range(count)]
        axis.plot(across, [100 * d for d in gain["differences"]], "o", color=COLOURS["distilled"], alpha=0.45, ms=4)
        for half, line in (("corrected_half_width", 1.2), ("half_width", 3.5)):
            error = 100 * (gain[half] or 0.0)
            axis.errorbar(place + 0.3, 100 * gain["mean"], error, fmt="none", ecolor="black", elinewidth=line)
        axis.plot(place + 0.3, 100 * gain["mean"], "D", color="black", ms=5)
    axis.axhline(0.0, color="black", linewidth=0.8)
    _ticks(axis, list(gains))
    axis.set_ylabel("distilled - alone (points)")
    axis.set_title("Gain seed by seed, mean with 95 % intervals")
    note = "thick: paired t; thin: allowing for overlapping splits"
    axis.text(0.5, -0.2, note, transform=axis.transAxes, ha="center", va="top", fontsize=9)


def _times(axis: Any, found: dict[str, Any]) -> None:
    names = {"mfd_fast_ms": "mfd_fast", "eager_ms": "eager PyTorch", "compile_ms": "torch.compile"}
    colours = {"mfd_fast_ms": COLOURS["distilled"], "eager_ms": COLOURS["teacher"], "compile_ms": COLOURS["all_labels"]}
    timings = found["timings"]
    taken = [[(key, t[key]) for key in names if t[key] is not None] for t in timings]
    for place, times in enumerate(taken):
        if not times:
            continue
        axis.plot([ms for _, ms in times], [place] * len(times), color="0.8", linewidth=2, zorder=1)
        for key, ms in times:
            axis.plot(ms, place, "o", color=colours[key], ms=9, label=names[key])
            factor = "" if key == "mfd_fast_ms" else f"\n{ms / timings[place]['mfd_fast_ms']:.1f} x"
            above = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 8}
            axis.annotate(f"{ms:.3g}{factor}", (ms, place), **above)
    axis.set_yticks(range(len(timings)), [f"{t['what']}\non {t['backend'] or '-'}" for t in timings], fontsize=9)
    axis.set_ylim(len(timings) - 0.5, -0.6)
    axis.set_title("Forward + backward, median")
    axis.set_xlabel(f"ms (log scale), {found['machine']['threads']} threads")
    every = [ms for times in taken for _, ms in times]
    if every:
        axis.set_xscale("log")
        axis.set_xlim(min(every) / 2, max(every) * 2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x", color="0.9")
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        below = {"loc": "upper center", "ncols": 3, "bbox_to_anchor": (0.5, -0.16)}
        axis.legend(handles.values(), handles.keys(), frameon=False, **below)
