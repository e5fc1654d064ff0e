"""compute-sanitizer over the samples of every op: out-of-bounds accesses, races, uninitialised reads, barriers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import staging

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Part of the mangled names of our kernels; PyTorch's own are not ours to judge.
OURS = "mfd6device"
ERRORS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def find() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def run(tool: str, device: str, seconds: float) -> dict[str, object]:
    """The verdict of one tool: "green", or "red" with the end of what it said. A rehearsal only runs the samples."""
    script = [sys.executable, str(staging.ROOT / "tests" / "support" / "every_sample.py"), "--backend=cuda"]
    script += ["--dtype=bfloat16", *(["--first"] if tool == "initcheck" or device == "cpu" else ["--dtype=float32"])]
    sanitizer: list[str] = []
    if device == "cuda":
        found = find()
        if found is None:
            return {"verdict": "red", "why": "compute-sanitizer was not found"}
        sanitizer = [found, "--tool", tool, "--kernel-name", f"kns={OURS}", "--error-exitcode", "99"]
    environ = {**staging.environment(device, emulate=True), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*sanitizer, *script],
            cwd=staging.SITE,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        return {"verdict": "red", "why": f"it was not done after {seconds:.0f} s", "said": said[-2000:]}
    except OSError as error:
        return {"verdict": "red", "why": str(error)}
    summary, calls = ERRORS.findall(done.stdout), re.search(r"^(\d+) calls$", done.stdout, re.MULTILINE)
    green = done.returncode == 0 and calls is not None and (device == "cpu" or summary == ["0"])
    if green:
        return {"verdict": "green", "calls": int(calls[1]), "command": command_of(sanitizer)}
    return {"verdict": "red", "why": f"exit status {done.returncode}, errors {summary}", "said": done.stdout[-4000:]}


def command_of(sanitizer: list[str]) -> str:
    return " ".join([os.path.basename(word) for word in sanitizer[:1]] + sanitizer[1:])
