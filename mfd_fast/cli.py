"""The command ``mfd-fast env | check | demo | bench``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from . import terminal
from .backends import environment

VARIABLES = ("MFD_FAST_", "TRITON_", "OMP_", "KMP_", "GOMP_", "CUDA_VISIBLE_DEVICES")


# What shells report of a process that Ctrl-C ended, or whose reader went away.
INTERRUPTED, UNREAD = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    terminal.accept_any_text()
    try:
        status = _main(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # mfd-fast env | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return UNREAD
    except KeyboardInterrupt:
        print("\nmfd-fast: interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(argv: Sequence[str] | None) -> int:
    from . import __version__

    parser = argparse.ArgumentParser(prog="mfd-fast", description="Multimodal distillation at hardware speed.")
    parser.add_argument("--version", action="version", version=f"mfd-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{env,check,demo,bench}")
    commands.add_parser("env", help="versions, processor, devices, and which backends can run")
    commands.add_parser("check", help="every op on every backend here against float64", add_help=False)
    commands.add_parser("demo", help="a multimodal distillation on real data", add_help=False)
    commands.add_parser("bench", help="time an op at your own shape", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    bad = environment.problems()
    if bad and arguments.command != "env" and not {"-h", "--help"} & set(rest):
        for reason in bad:
            print(f"mfd-fast: {reason}", file=sys.stderr)
        return 2
    if arguments.command == "check":
        return check(rest)
    if arguments.command == "demo":
        return demo(rest)
    if arguments.command == "bench":
        return bench(rest)
    if rest:
        parser.error("unrecognized arguments: " + " ".join(rest))
    return env()


def env() -> int:
    """Print what a bug report needs."""
    facts, backends = describe(), backend_status()
    if importlib.util.find_spec("rich") is None:
        for name, value in [*facts, *(("backend " + name, value) for name, value in backends)]:
            print(f"{name:<18} {value}")
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    for title, rows in (("Environment", facts), ("Backends", backends)):
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)
    return 0


def describe() -> list[tuple[str, str]]:
    """Versions, processor, devices and environment variables, as (name, value)."""
    import torch

    from . import __version__
    from .backends import cpu

    facts = [
        ("mfd_fast", f"{__version__} in {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", str(torch.__version__)),
        ("triton", _version("triton")),
        ("processor", _processor()),
        ("torch threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical processors"),
    ]
    if not environment.problems() and cpu.available() is None:
        native = cpu.native()
        facts.append(("native module", f"compiled by {native.compiler}"))
        facts.append(("CPU ISA", f"{cpu.isa()}, chosen from {', '.join(native.supported_isas())}"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"sm_{properties.major}{properties.minor}"
            memory = properties.total_memory / 2**30
            facts.append((f"cuda:{index}", f"{properties.name}, {capability}, {memory:.0f} GiB"))
    else:
        facts.append(("GPU", "none that this PyTorch can use"))
    shown = {variable.name: f"not set: {variable.unset}" for variable in environment.VARIABLES}
    shown |= {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    for variable in environment.VARIABLES:
        shown[variable.name] = environment.problem(variable) or shown[variable.name]
    return [*facts, *shown.items()]


def backend_status() -> list[tuple[str, str]]:
    """(backend, "can run" or the reason why not)."""
    from . import backends

    return [
        (name, "can run" if reason is None else f"cannot run: {reason}") for name, reason in backends.status().items()
    ]


def check(argv: Sequence[str]) -> int:
    """Compare every op with float64, with its own arguments."""
    run = importlib.import_module("mfd_fast.check").main
    return int(run(list(argv)))


def demo(argv: Sequence[str]) -> int:
    """Run the demo with its own arguments."""
    run = importlib.import_module("mfd_fast.demo").main
    return int(run(list(argv)) or 0)


def bench(argv: Sequence[str]) -> int:
    """Time one op with its own arguments."""
    run = importlib.import_module("mfd_fast.bench.command").main
    return int(run(list(argv)))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (pip install 'mfd-fast[triton]')"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'unknown'} ({platform.machine()})"


if __name__ == "__main__":
    sys.exit(main())
