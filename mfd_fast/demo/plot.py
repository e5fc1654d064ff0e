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

    figure = draw(found, titles)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw(found: dict[str, Any], titles: dict[str, str]) -> Any:
    """The figure, on the backend that is in use."""
    import matplotlib.pyplot as plt

    # 9 inches: at 800 pixels, the width of a README, 9 points are 11 pixels.
    figure, axes = plt.subplot_mosaic(
        [["accuracy", "accuracy"], ["gain", "times"]], figsize=(9, 8.4), width_ratios=(1, 1.25), layout="constrained"
    )
    _accuracies(axes["accuracy"], found, titles)
    _gains(axes["gain"], found)
    _times(axes["times"], found)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.title.set_fontsize(11)
    return figure


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
    timings, height = found["timings"], 0.27
    for place, timing in enumerate(timings):
        for line, (key, name) in enumerate(names.items()):
            ms = timing[key]
            if ms is None:
                continue
            y = place + (line - 1) * height
            axis.barh(y, ms, 0.85 * height, color=colours[key], label=name if place == 0 else None)
            factor = "" if key == "mfd_fast_ms" else f"  ({ms / timing['mfd_fast_ms']:.1f} x)"
            axis.annotate(
                f"{ms:.3g}{factor}", (ms, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
            )
    every = [timing[key] for timing in timings for key in names if timing[key] is not None]
    axis.set_yticks(range(len(timings)), [_label(t) for t in timings], fontsize=9)
    axis.set_ylim(len(timings) - 0.5, -0.5)
    axis.set_title("Forward + backward, median")
    axis.set_xlabel(f"ms (log scale), {found['machine']['threads']} threads")
    if every:
        axis.set_xscale("log")
        axis.set_xlim(min(every) / 2, max(every) * 12)  # room for the numbers
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x", color="0.9")
        axis.legend(
            loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.42, -0.14), fontsize=9, columnspacing=1
        )


def _label(timing: dict[str, Any]) -> str:
    """Op, shape and backend on a line each."""
    what, _, rest = timing["what"].partition(" ")
    return f"{what}\n{rest}\non {timing['backend'] or '-'}"
