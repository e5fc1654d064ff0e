"""``mfd-fast bench <op>``: one call at the user's own shape, on the user's own device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backends, terminal
from . import ceilings, machine, results, screen
from .implementations import every
from .measure import LeftOutError, Settings, measure
from .ops import OPS
from .workloads import DTYPES, PHASES, Workload


def parser() -> argparse.ArgumentParser:
    """One subcommand per op, with its own sizes and options."""
    top = argparse.ArgumentParser(
        prog="mfd-fast bench",
        description="Time one op at your shape against other implementations, after a correctness gate, beside the "
        "floor that the machine's memory and GEMMs set.",
    )
    ops = top.add_subparsers(dest="op", required=True, metavar="{" + ",".join(OPS) + "}")
    for record in OPS.values():
        one = ops.add_parser(record.name, help=", ".join(record.sizes))
        for name, default in record.sizes.items():
            one.add_argument(f"--{name}", type=_count, default=default, help=f"default {default}")
        for name, default in record.options.items():
            flag = "--" + name.replace("_", "-")
            one.add_argument(flag, type=type(default), default=default, help=f"default {default}")
        one.add_argument("--dtype", choices=list(DTYPES), default="float32")
        one.add_argument("--phase", choices=PHASES, default="training", help="forward + backward, or forward alone")
        one.add_argument(
            "--against",
            type=_names,
            default=None,
            metavar="NAMES",
            help=f"comma-separated: {', '.join(every())}, or all; default eager,compile",
        )
        one.add_argument("--backend", choices=backends.NAMES, help="measure this backend of mfd_fast")
        one.add_argument("--device", default=None, help="cpu, cuda, cuda:1; default: the GPU if there is one")
        one.add_argument("--threads", type=_count, help="of PyTorch and of the cpu backend")
        one.add_argument("--seconds", type=float, default=5.0, help="of timing, beside compiling and checking")
        one.add_argument("--flush", action="store_true", help="evict the last-level cache before every call")
        one.add_argument("--json", type=Path, help="write the result with every sample here")
    return top


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 1 when something could not be measured, or was wrong."""
    terminal.accept_any_text()
    arguments = parser().parse_args(argv)
    record = OPS[arguments.op]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        device = device_of(arguments.device)
        against = chosen(arguments.against, device)
        if arguments.json is not None:
            results.check_writable(arguments.json)
    except (ValueError, OSError) as error:
        return _sorry(str(error))
    given = vars(arguments)
    options = {k: given[k] for k, default in record.options.items() if given[k] != default}
    workload = Workload(
        record.name, {k: given[k] for k in record.sizes}, arguments.dtype, options, phase=arguments.phase
    )
    settings = Settings(
        device,
        against,
        arguments.backend,
        arguments.seconds,
        flush=arguments.flush,
        said=_progress,
    )
    facts, neighbours = machine.facts(device), machine.Neighbours()
    try:
        rates = ceilings.measure(device, workload.torch_dtype, seconds=1.0)
        result = measure(workload, settings)
    except (LeftOutError, backends.BackendError) as reason:
        _progress("")
        return _sorry(f"{workload.name} cannot be measured: {reason}")
    except (RuntimeError, MemoryError) as error:
        _progress("")
        from .memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _sorry(f"{workload.name} cannot be measured: out of memory")
    _progress("")
    found = document([result], {**facts, "neighbours": neighbours.share()}, rates)
    screen.show(result, found)
    if arguments.json is not None:
        try:
            results.save(found, arguments.json)
        except OSError as error:
            return _sorry(str(error))
    return 0 if results.primary(result) is not None else 1


def document(
    found: list[dict[str, Any]], facts: dict[str, Any], rates: dict[str, float], **more: Any
) -> dict[str, Any]:
    """A result file; ``facts`` are those of the machine before the run."""
    return {
        "schema": results.SCHEMA,
        "machine": facts,
        "ceilings": rates,
        "results": found,
        **more,
    }


def device_of(name: str | None) -> torch.device:
    """Raises ValueError, in a sentence, for a device that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such kind of device") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: only cpu and cuda can be measured")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} such devices here")
    return device


def chosen(names: Sequence[str] | None, device: torch.device) -> list[str]:
    """The implementations to compare with. Raises ValueError for an unknown or, when named, a missing one."""
    known = every()
    if names is None:
        return [name for name in ("eager", "compile") if known[name].missing(device) is None]
    if list(names) == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"--against {name}: unknown; known are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a size")
    return value


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _sorry(sentence: str) -> int:
    print(f"mfd-fast bench: {sentence}", file=sys.stderr)
    return 1
