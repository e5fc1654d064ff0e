"""``python -m benchmarks``: suites, growth, tables, files, the published report."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REPORT = ROOT / "docs" / "performance.md"
PROFILES = ROOT / "benchmarks" / "profiles.md"
PICTURES = ROOT / "docs" / "performance"
PAGE = "cpu"  # the suite that the report begins with


def parser() -> argparse.ArgumentParser:
    from mfd_fast.bench.command import _names
    from mfd_fast.bench.ops import OPS

    from .suites import SUITES

    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    top.add_argument("--suite", choices=list(SUITES), default="cpu")
    top.add_argument("--quick", action="store_true", help="the suite cpu-quick: under two minutes")
    top.add_argument("--op", action="append", choices=list(OPS), help="only this op (may be repeated)")
    top.add_argument("--only", metavar="TEXT", help="only workloads whose name contains TEXT")
    top.add_argument("--against", type=_names, metavar="NAMES", help="instead of the suite's own rivals; 'all'")
    top.add_argument("--growth", action="store_true", help="also fit time and memory against N, C, D, M")
    top.add_argument("--list", action="store_true", help="name the workloads and stop")
    top.add_argument("--device", help="default: the suite's")
    top.add_argument("--threads", type=int)
    top.add_argument("--seconds", type=float, help="of timing per workload")
    top.add_argument("--minutes", type=float, help="of the whole suite; the rest is left out and named")
    top.add_argument("--compile-seconds", type=float, help="of all compilations; the rest is left out and named")
    top.add_argument("--flush", action="store_true", help="evict the last-level cache before every call")
    top.add_argument("--from", dest="source", type=Path, metavar="JSON", help="show an earlier result file again")
    top.add_argument("--json", type=Path, help="write the result file here, anew after every workload")
    top.add_argument(
        "--resume", action="store_true", help="keep what the file of --json has; measure what its call had no time for"
    )
    top.add_argument("--csv", type=Path)
    top.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNG and SVG pictures here")
    top.add_argument(
        "--report", type=Path, metavar="FOLDER", help="write result file, CSV, pictures and performance.md here"
    )
    top.add_argument("--compare", type=Path, metavar="JSON", help="exit with 2 if anything is slower than in this file")
    top.add_argument("--publish", action="store_true", help=f"write {REPORT.relative_to(ROOT)} and its raw file")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if mfd_fast was red anywhere, or nothing could be measured; 2 see --compare."""
    arguments = parser().parse_args(argv)
    lacking = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    drawn = arguments.csv or arguments.plots or arguments.report or arguments.publish or arguments.compare
    if lacking and (drawn or not arguments.json):
        print(
            f"benchmarks need {', '.join(lacking)}: pip install 'mfd-fast[bench]'; --json FILE needs nothing",
            file=sys.stderr,
        )
        return 1
    if "rich" in lacking:
        return _plain(arguments)
    from rich.console import Console

    from mfd_fast.bench import machine, results

    from . import compare, table

    console = Console(width=None if sys.stdout.isatty() else 170)
    try:
        found = results.load(arguments.source) if arguments.source else _measured(arguments, console)
    except (OSError, ValueError, machine.DeviceLostError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    if found is None:
        return 0
    table.show(found, console)
    for path in write(found, arguments):
        console.print(str(path), style="dim", highlight=False)
    slower = False
    if arguments.compare:
        changes = compare.changes(results.load(arguments.compare), found)
        slower = any(change.is_slower for change in changes)
        compare.show(changes, console)
    return _status(found) or (2 if slower else 0)


def _plain(arguments: argparse.Namespace) -> int:
    """Without rich: the file, and a sentence for each workload."""
    from mfd_fast.bench import machine, results

    try:
        found = results.load(arguments.source) if arguments.source else _measured(arguments, None)
    except (OSError, ValueError, machine.DeviceLostError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    if found is None:
        return 0
    for result in found["results"]:
        print(f"{result['workload']['name']}: {results.verdict(result)}")
    for path in write(found, arguments):
        print(path)
    return _status(found)


def _status(found: dict[str, Any]) -> int:
    """1 if mfd_fast was red or raised anywhere, or nothing could be measured."""
    from mfd_fast.bench import results

    from .run import FAILED

    wrong = [r for r in found["results"] if any(m["name"] == r["primary"] for m in results.red(r))]
    wrong += [r for r in found["results"] if r["left_out"].get(r["primary"], "").startswith("it fails")]
    raised = [left for left in found["left_out"] if left["reason"].startswith(FAILED)]
    return 1 if wrong or raised or not found["results"] else 0


def _measured(arguments: argparse.Namespace, console: Any) -> dict[str, Any] | None:
    import torch

    from mfd_fast.bench import results
    from mfd_fast.bench.command import chosen, device_of

    from . import growth
    from .run import run_suite
    from .suites import SUITES

    suite = SUITES["cpu-quick" if arguments.quick else arguments.suite]
    entries = [
        entry
        for entry in suite.entries
        if (not arguments.op or entry.workload.op in arguments.op)
        and (not arguments.only or arguments.only in entry.workload.name)
    ]
    if arguments.list:
        for entry in entries:
            print(f"{entry.workload.name}  against {', '.join(entry.against)}")
        return None
    if not entries:
        raise ValueError("no workload of this suite has that name")
    if arguments.resume and not arguments.json:
        raise ValueError("--resume needs --json FILE")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = device_of(arguments.device or suite.device)
    return run_suite(
        replace(suite, device=str(device)),
        entries,
        device,
        against=None if arguments.against is None else chosen(arguments.against, device),
        seconds=arguments.seconds,
        minutes=arguments.minutes,
        compile_seconds=arguments.compile_seconds,
        flush=arguments.flush,
        growth=growth.measure_all if arguments.growth else None,
        quiet=not sys.stdout.isatty() or console is None,
        keep=(lambda found: results.save(found, arguments.json)) if arguments.json else lambda _: None,
        before=results.load(arguments.json) if arguments.resume and arguments.json.exists() else None,
    )


def write(found: dict[str, Any], arguments: argparse.Namespace) -> list[Path]:
    """Every file that was asked for; returns their paths."""
    from mfd_fast.bench import results

    written: list[Path] = []
    if arguments.json:
        results.save(found, arguments.json)
        written.append(arguments.json)
    if not (arguments.csv or arguments.plots or arguments.report or arguments.publish):
        return written

    from . import plots, report, table

    if arguments.csv:
        table.write_csv(found, arguments.csv)
        written.append(arguments.csv)
    if arguments.plots:
        written += plots.draw(found, arguments.plots)
    if arguments.report:
        folder = arguments.report
        pictures = plots.draw(found, folder)
        results.save(found, folder / "results.json")
        table.write_csv(found, folder / "results.csv")
        names = [path.name for path in pictures if path.suffix == ".svg"]
        (folder / "performance.md").write_text(report.render(found, "results.json", names), encoding="utf-8")
        written.append(folder / "performance.md")
    if arguments.publish:
        raw = RESULTS / f"{results_name(found)}.json"
        if arguments.source and arguments.source.resolve().parent == RESULTS:
            raw = arguments.source.resolve()
        else:
            results.save(found, raw)
        (main, whole), *more = published_files()
        pictures = plots.draw(report.combined(whole, more), PICTURES)
        profiles = PROFILES.read_text(encoding="utf-8")
        REPORT.write_text(report.render(whole, main, published(pictures), more, profiles), encoding="utf-8")
        written += [raw, REPORT]
    return written


def results_name(found: dict[str, Any]) -> str:
    """Of a result file: machine, date and commit, and of another suite than the page's its name and instruction set."""
    from mfd_fast.bench import machine

    own = [] if found["suite"] == PAGE else [found["suite"], found["machine"]["isa"]]
    return "-".join([machine.slug(found["machine"]), *own])


def published_files() -> list[tuple[str, dict[str, Any]]]:
    """The newest result file of the page's suite, then those of other suites for the same device: the newest of each
    suite and instruction set.
    """
    from mfd_fast.bench import results

    newest: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path in RESULTS.glob("*.json"):
        found = results.load(path)
        key = found["suite"], "" if found["suite"] == PAGE else found["machine"]["isa"]
        if key not in newest or newest[key][1]["machine"]["date"] < found["machine"]["date"]:
            newest[key] = path, found
    device = newest[PAGE, ""][1]["machine"]["device"]
    order = [(PAGE, ""), *sorted(key for key in newest if key[0] != PAGE)]
    files = [newest[key] for key in order if newest[key][1]["machine"]["device"] == device]
    return [(f"../{path.relative_to(ROOT).as_posix()}", found) for path, found in files]


def published(pictures: list[Path]) -> list[str]:
    """The SVG files, seen from the report."""
    return [f"{PICTURES.name}/{path.name}" for path in pictures if path.suffix == ".svg"]


if __name__ == "__main__":
    sys.exit(main())
