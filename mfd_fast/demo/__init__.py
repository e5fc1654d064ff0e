"""``mfd-fast demo``: a real multimodal distillation, and what its step costs beside eager PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import terminal
from ..backends import NAMES, BackendError

if TYPE_CHECKING:
    from rich.progress import Progress

    from .train import Config, SeedResult

__all__ = ["main"]

PACKAGES = ("rich", "matplotlib", "sklearn", "numpy")

_networks: Any = None  # in a worker process: networks trained so far by all workers together


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mfd-fast demo",
        description="Distils a teacher that fuses three sensors into small students on scikit-learn's digits, "
        "times its step beside eager PyTorch and torch.compile, and writes demo.png and demo.json.",
    )
    add = parser.add_argument
    add("--seeds", type=_positive, default=10, metavar="N", help="repetitions, seeds 0 .. N-1 (default 10)")
    add("--epochs", type=_positive, default=40, metavar="N", help="passes over the student's images (default 40)")
    add(
        "--workers",
        type=_positive,
        default=2,
        metavar="N",
        help="processes that train, one thread each (default 2; 1: no processes)",
    )
    add("--threads", type=_positive, metavar="N", help="threads of the step timing (default: PyTorch's choice)")
    add("--backend", choices=NAMES, help="backend of the timed losses (default: the fastest that can run)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="time torch.compile of the eager steps too (default: unless --quick)",
    )
    add("--output", type=Path, default=Path("build", "demo"), metavar="DIR", help="default build/demo")
    add("--quick", action="store_true", help="2 seeds, 2 epochs, small timings: shows that it runs, proves nothing")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, times, reports; returns 0 unless something failed (also when distillation did not help)."""
    terminal.accept_any_text()
    options = _parser().parse_args(argv)
    missing = missing_packages()
    if missing:
        return _fail(f"mfd-fast demo needs {', '.join(missing)}: pip install 'mfd-fast[demo]'")
    try:
        return _run(options)
    except (BackendError, OSError) as error:
        return _fail(f"mfd-fast demo: {error}")


def missing_packages() -> list[str]:
    """Packages of the extra ``demo`` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


def _run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import report, timing
    from .train import Config

    config = replace(Config(), epochs=2) if options.quick else replace(Config(), epochs=options.epochs)
    seeds = 2 if options.quick else options.seeds
    compiled = not options.quick if options.compile is None else options.compile
    # What cannot work fails here, before minutes of training.
    options.output.mkdir(parents=True, exist_ok=True)
    workloads = timing.workloads(config, options.quick)
    timing.check_backend(workloads, options.backend)

    console = Console()
    threads = torch.get_num_threads()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        torch.set_num_threads(options.threads or threads)
        console.print(report.introduction(config), highlight=False)
        with Progress(*columns, console=console) as progress:
            results = train_seeds(seeds, config, options.workers, progress)
            task = progress.add_task("timing steps", total=len(workloads))
            timings = []
            for workload in workloads:
                seconds = 0.2 if options.quick else 3.0
                timings.append(timing.measure(workload, options.backend, seconds, compiled))
                progress.advance(task)
        found = report.as_json(results, timings, config)
        report.show(console, found)
    finally:
        torch.set_num_threads(threads)
    for path in report.write(found, options.output):
        console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    return 0


def train_seeds(seeds: int, config: Config, workers: int, progress: Progress) -> list[SeedResult]:
    """Results of seeds 0 .. ``seeds - 1``, in this order; the bar counts networks."""
    from .train import ARMS

    task = progress.add_task("training networks", total=seeds * len(ARMS))
    if workers == 1:
        return [_train_seed(seed, config, lambda: progress.advance(task)) for seed in range(seeds)]
    spawn = multiprocessing.get_context("spawn")
    count = spawn.Value("i", 0)
    pool = ProcessPoolExecutor(min(workers, seeds), spawn, _start_worker, (count,))
    with _interrupts() as interrupted:
        with _deaf_to_interrupts():
            futures = [pool.submit(_train_seed, seed, config) for seed in range(seeds)]
        rest: set[Future[SeedResult]] = set(futures)
        while rest and not interrupted and not any(future.done() and future.exception() for future in futures):
            _, rest = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
            progress.update(task, completed=count.value)
        if interrupted:
            for worker in multiprocessing.active_children():
                worker.kill()
        pool.shutdown(wait=not rest, cancel_futures=True)
    if interrupted:
        raise KeyboardInterrupt
    # The seed that failed first speaks for all; the others may have been cancelled.
    failed = [future for future in futures if future.done() and not future.cancelled() and future.exception()]
    return [future.result() for future in failed or futures]


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C makes longer, instead of an exception in the middle of starting a process."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside never see Ctrl-C: their parent ends them, and says so once."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(count: Any) -> None:
    global _networks
    _networks = count


def _count_network() -> None:
    with _networks.get_lock():
        _networks.value += 1


def _train_seed(seed: int, config: Config, done: Callable[[], None] = _count_network) -> SeedResult:
    """One seed on one thread, which is fastest for networks this small."""
    import torch

    from .data import load
    from .train import run_seed

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_seed(*load(), seed, config, done)
    finally:
        torch.set_num_threads(threads)
