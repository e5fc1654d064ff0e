"""The journal of `make gpu`: a line for every item that has come to an end, in the folder of the results.

A later call leaves out what the journal has. What is going on is not in it but in a mark, a small file of each process
that its parent reads to see what hangs or has died. Neither needs more than the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GREEN, RED, LEFT_OUT = "green", "red", "left out"
#: Exit status of a process whose device no longer answers.
LOST = 70
#: Characters of a reason; fewer once the journal has ``MANY_BYTES``: a result file may have 16 MiB.
LONG, SHORT, MANY_BYTES = 1500, 160, 8 << 20
MARK = "MFD_GPU_MARK"


class Journal:
    """Several processes append to ``path``, a line in one write each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self, **fields: Any) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, json.dumps(fields).encode() + b"\n")
        finally:
            os.close(file)

    def end(self, part: str, item: str, outcome: str, why: str = "", **more: Any) -> None:
        """The item's outcome; the last one counts."""
        full = self.path.exists() and self.path.stat().st_size > MANY_BYTES
        said = {"why": why[-(SHORT if full else LONG) :]} if why else {}
        self.say(part=part, item=item, outcome=outcome, **said, **more)

    def plan(self, part: str, share: str, total: int) -> None:
        """How many items a process of a part has, those that are done included."""
        self.say(part=part, share=share, total=total)

    def lines(self) -> list[dict[str, Any]]:
        """A line that a killed process has left half written is none."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(errors="replace").split("\n"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def ended(self, part: str) -> dict[str, dict[str, Any]]:
        """Item -> its last line."""
        return {x["item"]: x for x in self.lines() if x.get("part") == part and "item" in x}

    def total(self, part: str, shares: Sequence[str]) -> int | None:
        """Of all processes of the part; None while one has not said."""
        plans = {x["share"]: x["total"] for x in self.lines() if x.get("part") == part and "total" in x}
        return sum(plans[share] for share in shares) if set(shares) <= plans.keys() else None

    def mend(self) -> None:
        """Ends a half-written line, so that the next one stands alone."""
        if self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")


def mark(item: str | None, path: Path | None = None) -> None:
    """What this process does now; None: nothing that has a name."""
    path = path or (Path(os.environ[MARK]) if MARK in os.environ else None)
    if path is None:
        return
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"item": item, "since": time.time()}))
    fresh.replace(path)


def marked(path: Path) -> tuple[str | None, float]:
    said = json.loads(path.read_text())
    return said["item"], said["since"]


def die_with_the_parent() -> None:
    """A killed call leaves no process on the GPU (Linux)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (AttributeError, OSError):
        return
    if os.getppid() == 1:
        os._exit(1)


def last_line(error: BaseException) -> str:
    """``RuntimeError: what it says first``."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
