"""Runs a part's processes until a time; what hangs is killed, what dies is named, and both are started anew."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from journal import LOST, MARK, RED, Journal, mark, marked

#: Seconds that a process may take before its first item, between two and after the last.
START = 60.0
#: Seconds that an item may take beyond the part's time; it is then left for another call.
GRACE = 5.0
#: Seconds after which a killed process that is still there means a GPU that does not let go of it.
DYING = 10.0
#: Times that a process is started anew.
MOST_STARTS = 12
#: Exit statuses of pytest and of worker.py after which nothing is left to do: 2 is an interrupt, 5 no tests.
AT_THE_END = (0, 1, 2, 5)


class DeviceGoneError(Exception):
    """The GPU answers to no process; nothing more can run on it."""


@dataclass
class Limits:
    """``until``: of time.time; ``patience``: seconds for an item; ``start``: for what has no name."""

    until: float
    patience: float = 20.0
    start: float = START
    poll: float = 0.1


@dataclass
class Child:
    share: str
    process: subprocess.Popen[bytes]
    mark: Path
    starts: int = 1
    unnamed: int = 0


@dataclass
class Supervisor:
    """One part. ``alive`` says whether a new process gets the device."""

    part: str
    command: Callable[[str], Sequence[str]]
    environment: Mapping[str, str]
    journal: Journal
    home: Path
    log: Path
    limits: Limits
    alive: Callable[[], bool]
    cwd: Path | None = None
    notes: list[str] = field(default_factory=list)

    def run(self, shares: Sequence[str]) -> list[str]:
        """Notes on what was started anew and why. Raises DeviceGoneError; no process is left in any case."""
        self.home.mkdir(parents=True, exist_ok=True)
        children = {share: self._begin(share) for share in shares}
        try:
            while children:
                time.sleep(self.limits.poll)
                for share, child in list(children.items()):
                    why, lost = self._ended(child)
                    if why is None:
                        continue
                    del children[share]
                    again = self._judge(child, why, lost)
                    if again:
                        children[share] = again
        finally:
            for child in children.values():
                self._kill(child)
        return self.notes

    def _begin(self, share: str) -> Child:
        where = self.home / f"{self.part}-{share.replace('/', 'of')}.mark"
        mark(None, where)
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                list(map(str, self.command(share))),
                env={**self.environment, MARK: str(where)},
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )
        return Child(share, process, where)

    def _ended(self, child: Child) -> tuple[str | None, bool]:
        """Why it has ended or was killed now ("" in order, None while it runs), and whether the GPU is in doubt."""
        status = child.process.poll()
        if status is not None:
            if status in AT_THE_END:
                return "", False
            return ("it lost the device" if status == LOST else f"its process ended with status {status}"), True
        item, since = marked(child.mark)
        now = time.time()
        if now > self.limits.until + GRACE:
            self._kill(child)
            return "", False
        patience = self.limits.patience if item else self.limits.start
        if now - since <= patience:
            return None, False
        self._kill(child)
        return f"it did not end within {patience:g} s", True

    def _judge(self, child: Child, why: str, in_doubt: bool) -> Child | None:
        """The process that takes up the rest, if there is one."""
        if not why:
            return None
        item, _ = marked(child.mark)
        if item is None:
            child.unnamed += 1
            item = f"process {child.share}"
            self.journal.end(self.part, item, RED, f"{why}: {tail(self.log)}", extra=True)
        else:
            child.unnamed = 0
            if why != "it lost the device" or item not in self.journal.ended(self.part):
                self.journal.end(self.part, item, RED, why)
        self.notes.append(f"{item}: {why}")
        if in_doubt and not self.alive():
            raise DeviceGoneError(f"the device answers to no process since {item}: {why}")
        if child.unnamed > 1 or child.starts >= MOST_STARTS or time.time() > self.limits.until:
            return None
        fresh = self._begin(child.share)
        fresh.starts, fresh.unnamed = child.starts + 1, child.unnamed
        return fresh

    def _kill(self, child: Child) -> None:
        for group in (True, False):
            try:
                os.killpg(child.process.pid, signal.SIGKILL) if group else child.process.kill()
            except (ProcessLookupError, PermissionError):
                continue
        try:
            child.process.wait(timeout=DYING)
        except subprocess.TimeoutExpired:
            raise DeviceGoneError(f"process {child.share} of {self.part} cannot be killed") from None


def tail(log: Path, characters: int = 400) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - characters))
        return file.read().decode(errors="replace").strip()
