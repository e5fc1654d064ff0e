"""What the demo tells: the terminal's tables and the JSON file. The plot is in plot.py."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import sklearn
import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from .data import CLASSES, IMAGES, SENSORS, SIZES
from .models import FusionNet, parameter_count
from .plot import plot
from .statistics import mean_and_error, paired
from .timing import Timing
from .train import ARMS, Config, SeedResult

TITLES = {
    "teacher": "teacher",
    "alone": "student alone",
    "distilled": "student distilled",
    "same_images": "a: same images",
    "all_labels": "b: all labels",
}
NOTES = (
    "± is the standard error over the seeds. 'no X' is the same network with that sensor masked out at test time.",
    "Control a: distilled on the labelled images only, so without additional images. "
    "Control b: no teacher, the true labels of all the student's images.",
    "The three 'sensors' are views of one image: they share one source. The random split mixes the 13 writers "
    "of scikit-learn's digits, so nothing here speaks of new writers.",
    "Splits of different seeds overlap. The wider interval allows for that (Nadeau and Bengio 2003); the verdict "
    "uses it. Settings were chosen on seeds 1000 to 1003 of the same images.",
)


def introduction(config: Config) -> str:
    """Who learns from what."""
    count = _parameters(config)
    unlabelled = config.student_rows - config.labelled_rows
    return (
        "Digits seen by three sensors: left half, right half, spectrum of the image.\n"
        f"  teacher            {count['teacher']:>7,} parameters, {_teacher_rows(config)} labelled images\n"
        f"  student alone      {count['student']:>7,} parameters, {config.labelled_rows} labelled images\n"
        f"  student distilled  the same start, the same {config.labelled_rows} labelled images, and the\n"
        f"                     teacher's word on them and on {unlabelled} images without labels\n"
        "Every step's loss is one call of mfd_fast.mfd_loss."
    )


def _teacher_rows(config: Config) -> int:
    return IMAGES - config.test_rows - config.student_rows


def _parameters(config: Config) -> dict[str, int]:
    with torch.random.fork_rng(devices=[]):
        teacher = FusionNet(SIZES, config.teacher_hidden, config.teacher_width, CLASSES, config.teacher_layers)
        student = FusionNet(SIZES, config.student_hidden, config.student_width, CLASSES)
    return {"teacher": parameter_count(teacher), "student": parameter_count(student)}


def as_json(results: list[SeedResult], timings: list[Timing], config: Config) -> dict[str, Any]:
    """Everything that was measured, with what it was measured on. Numbers that do not exist are None.

    Accuracies and their differences are shares (0..1), one per seed in the order of ``seeds``; times are ms.
    """
    conditions = list(results[0].accuracy["teacher"])
    accuracy = {arm: {c: [seed.accuracy[arm][c] for seed in results] for c in conditions} for arm in ARMS}
    shares = {arm: {name: [seed.shares[arm][name] for seed in results] for name in SENSORS} for arm in ARMS}
    ratio = config.test_rows / (IMAGES - config.test_rows)
    found = {
        "versions": {
            "mfd_fast": __version__,
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "config": asdict(config),
        "parameters": _parameters(config),
        "notes": list(NOTES),
        "seeds": list(range(len(results))),
        "accuracy": accuracy,
        "summary": _summary(accuracy),
        "shares": shares,
        "share_summary": _summary(shares),
        "paired": {
            f"distilled - {arm}": {
                c: asdict(paired(accuracy["distilled"][c], accuracy[arm][c], ratio)) for c in conditions
            }
            for arm in ARMS
            if arm != "distilled"
        },
        "timings": [{**asdict(t), "eager_ratio": t.eager_ratio, "compile_ratio": t.compile_ratio} for t in timings],
        "verdict": verdict(accuracy["distilled"]["all sensors"], accuracy["alone"]["all sensors"], ratio),
    }
    cleaned: dict[str, Any] = _without_nan(found)
    return cleaned


def _summary(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard error over the seeds, per arm and column."""
    names = ("mean", "standard_error")
    return {
        arm: {column: dict(zip(names, mean_and_error(values), strict=True)) for column, values in by.items()}
        for arm, by in found.items()
    }


def _without_nan(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def verdict(distilled: list[float], alone: list[float], test_to_train: float) -> str:
    """One sentence on distilled against alone; a gain is only named with its error."""
    gain = paired(distilled, alone, test_to_train)
    if len(distilled) < 2:
        return "One seed cannot tell whether distillation helped: use --seeds 10."
    text = (
        f"{100 * gain.mean:+.1f} points over {len(distilled)} seeds, 95 % interval ± {100 * gain.half_width:.1f} "
        "(paired t), "
        f"± {100 * gain.corrected_half_width:.1f} allowing for overlapping splits; sign test p = {gain.sign_p:.2g}"
    )
    if not gain.excludes_zero:
        return f"No difference that these seeds can show: {text}."
    return f"Distillation {'helped' if gain.mean > 0 else 'hurt'}: {text}."


def show(console: Console, found: dict[str, Any]) -> None:
    """The tables, the verdict and the notes."""
    console.print(_accuracy_table(found))
    console.print(found["verdict"], style="bold", highlight=False)
    console.print(_share_table(found))
    for note in found["notes"]:
        console.print(note, style="dim", highlight=False)
    console.print()
    console.print(_timing_table(found))
    for timing in found["timings"]:
        if timing["note"]:
            console.print(f"{timing['what']}: {timing['note']}", style="yellow", highlight=False)
    if any(timing["backend"] == "reference" for timing in found["timings"]):
        text = "'reference' is plain PyTorch too: expect no speed-up where no faster backend can run an op."
        console.print(text, style="dim", highlight=False)


def _accuracy_table(found: dict[str, Any]) -> Table:
    count = len(found["seeds"])
    table = Table(title=f"Test accuracy in %, {count} seed{'s' if count > 1 else ''}")
    table.add_column("", no_wrap=True)
    for condition in found["summary"]["teacher"]:
        table.add_column(condition.replace("without ", "no ").removesuffix(" half"), justify="right", no_wrap=True)
    _add_arms(table, found["summary"])
    table.add_section()
    gains = found["paired"]["distilled - alone"].values()
    table.add_row("gain, 95 %", *[_with_error(f"{100 * g['mean']:+.1f}", g["half_width"]) for g in gains])
    corrected = [_with_error(" " * 4, g["corrected_half_width"]) for g in gains]
    table.add_row("  corrected", *corrected, style="dim")
    return table


def _share_table(found: dict[str, Any]) -> Table:
    table = Table(title="Learned modality weights: mean share of each sensor in %, all sensors present")
    for name in ("", *SENSORS):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    _add_arms(table, found["share_summary"])
    return table


def _add_arms(table: Table, summary: dict[str, Any]) -> None:
    """One row per arm of percentages with their standard errors."""
    for arm, by in summary.items():
        style = {"distilled": "bold green", "same_images": "dim", "all_labels": "dim"}.get(arm)
        cells = [_with_error(f"{100 * s['mean']:.1f}", s["standard_error"]) for s in by.values()]
        table.add_row(TITLES[arm], *cells, style=style)


def _with_error(text: str, error: float | None) -> str:
    return f"{text} ±  ? " if error is None else f"{text} ± {100 * error:.1f}"


def _timing_table(found: dict[str, Any]) -> Table:
    machine, timings = found["machine"], found["timings"]
    compiled = any(timing["compile_ms"] is not None for timing in timings)
    threads = machine["threads"]
    title = f"Forward + backward: median ms, {threads} thread{'s' if threads > 1 else ''}, {machine['cpu']}"
    table = Table(title=title)
    names = ["step", "on", "mfd_fast", "eager", *(["torch.compile"] if compiled else [])]
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    for t in timings:
        cells = [t["what"], t["backend"] or "-", _ms(t["mfd_fast_ms"]), _ms(t["eager_ms"], t["eager_ratio"])]
        table.add_row(*cells, *([_ms(t["compile_ms"], t["compile_ratio"])] if compiled else []))
    return table


def _ms(value: float | None, ratio: float | None = None) -> str:
    """Three digits of milliseconds, and how many times mfd_fast's time that is."""
    if value is None:
        return "-"
    text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return text if ratio is None else f"{text} ({ratio:.1f}x)"


def cpu_name() -> str:
    """Model name of the processor, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write(found: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """demo.png and demo.json in ``folder``; returns their paths."""
    image, data = folder / "demo.png", folder / "demo.json"
    plot(found, TITLES, image)
    data.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return image, data
