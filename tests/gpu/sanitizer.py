"""compute-sanitizer: it must find two planted faults, its filter must match our kernels, then their samples are silent.

With a filter that matches nothing every tool is silent. So each tool first runs a program whose kernels bear names like
ours and are wrong; and the names of the kernels that the samples launch, as PyTorch's profiler sees them, must match.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import staging

#: Tools, the most telling first.
TOOLS = ("memcheck", "racecheck")
#: Of our kernels' names, mangled and as the profiler shows them; PyTorch's own kernels are not ours to judge.
OURS, SHOWN = "mfd6device", "mfd::device"
ERRORS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
#: Seconds that a tool may take.
PATIENCE = 40.0


def find(device: str) -> list[str] | None:
    """The command; in a rehearsal its stand-in."""
    if device == "cpu":
        return [sys.executable, str(staging.ROOT / "tests" / "support" / "fake_sanitizer.py")]
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    return [found] if found else None


def items(device: str, until: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """The controls before what they vouch for; in a rehearsal one tool speaks for both."""
    tools = TOOLS if device == "cuda" else TOOLS[:1]
    steps: dict[str, Callable[..., dict[str, Any]]] = {
        f"planted {tool}": functools.partial(planted, tool) for tool in tools
    }
    steps |= {"names": names, **{f"samples {tool}": functools.partial(samples, tool) for tool in tools}}
    return {name: functools.partial(step, device, until) for name, step in steps.items()}


def planted(tool: str, device: str, until: float) -> dict[str, Any]:
    """Red where the tool does not report the fault."""
    program = [sys.executable, "-c", f"print('planted {tool}')"] if device == "cpu" else [str(staging.planted())]
    said = under(tool, [*program, tool], device, until)
    if said.get("why"):
        return {"outcome": "red", **said}
    if not any(said["errors"]):
        return {"outcome": "red", "why": f"{tool} is blind: it reports no error of a planted fault", **said}
    return {"outcome": "green", **said}


def names(device: str, until: float) -> dict[str, Any]:
    """Red where no kernel of the samples has a name that the filter matches."""
    done = call([*script(device), "--kernels"], device, until)
    found = re.findall(r"^kernel (.*)$", done, re.MULTILINE)
    ours = sorted({name.split("<")[0].split("(")[0] for name in found if SHOWN in name})
    if device == "cuda" and not ours:
        return {"outcome": "red", "why": f"of {len(found)} kernels none has {SHOWN} in its name: {done[-300:]}"}
    return {"outcome": "green", "kernels": ours}


def samples(tool: str, device: str, until: float) -> dict[str, Any]:
    """Red where the tool reports anything of one sample of every class of kernels."""
    said = under(tool, script(device), device, until)
    calls = re.search(r"^(\d+) calls$", said["said"], re.MULTILINE)
    if not said.get("why") and (calls is None or said["errors"] != [0]):
        said["why"] = f"errors {said['errors']}, {calls[0] if calls else 'the samples did not end'}"
    if said.get("why"):
        return {"outcome": "red", **said, "why": f"{said['why']}: {said['said'][-800:]}"}
    return {"outcome": "green", "calls": int(calls[1]), "errors": said["errors"], "command": said["command"]}


def script(device: str) -> list[str]:
    path = staging.ROOT / "tests" / "support" / "every_sample.py"
    some = "--variants" if device == "cuda" else "--first"
    return [sys.executable, str(path), "--backend=cuda", "--dtype=bfloat16", some]


def under(tool: str, program: Sequence[str], device: str, until: float) -> dict[str, Any]:
    """``errors`` as the tool counts them, ``said``, ``command``; ``why`` where it did not run."""
    command = find(device)
    if command is None:
        return {"why": "compute-sanitizer was not found", "said": "", "errors": []}
    command = [*command, "--tool", tool, "--kernel-name", f"kns={OURS}"]
    said = call([*command, *program], device, until)
    found = {"errors": [int(n) for n in ERRORS.findall(said)], "said": said[-1500:]}
    return {**found, "command": " ".join([os.path.basename(command[0]), *command[1:]])}


def call(command: Sequence[str], device: str, until: float) -> str:
    """What it prints, with what became of it. A tool may begin as long as the part has time, and then has its own."""
    environ = {**staging.environment(device, emulate=True), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    seconds = max(min(PATIENCE, until - time.time() + PATIENCE / 2), 1.0)
    try:
        done = subprocess.run(
            command,
            cwd=staging.SITE,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        return f"{(error.stdout or b'').decode(errors='replace')}\nit was not done after {seconds:.0f} s"
    except OSError as error:
        return str(error)
    return f"{done.stdout}\nexit status {done.returncode}"
