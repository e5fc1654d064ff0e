"""Runs a part's tests in several processes, until a time; a journal makes it resumable."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import battery
import staging

#: Seconds that a test may take beyond the time of the call before it counts as one that hangs.
PATIENCE = 60


@dataclass
class Verdicts:
    """What the journals say: outcomes by test, and how many tests there are."""

    total: int | None = None
    passed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)
    #: Files that cannot be imported.
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def done(self) -> set[str]:
        return self.passed | self.failed.keys()

    @property
    def left(self) -> int | None:
        return None if self.total is None else self.total - len(self.done)


def read(folder: Path) -> Verdicts:
    found = Verdicts()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            said = json.loads(line)
            if "total" in said:
                found.total = said["total"]
                continue
            if "broken" in said:
                found.broken[said["broken"]] = said["why"]
                continue
            name = said["test"]
            found.running.pop(name, None)
            if said["outcome"] == "started":
                found.running[name] = said["time"]
            elif said["outcome"] == "passed":
                found.passed.add(name)
            else:
                found.failed[name] = said["why"]
    return found


def run(
    folder: Path, device: str, until: float, shares: int, *, backend: str | None = None, first: int | None = None
) -> Verdicts:
    """Goes on with the tests of ``backend``, without one those of tests/gpu; their verdicts are in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done.txt"
    done.write_text("\n".join(sorted(read(folder).done)))
    tests = staging.ROOT / "tests"
    where = [tests, *(f"--ignore-glob={tests / name}" for name in battery.NOT_HERE)] if backend else [tests / "gpu"]
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "battery", "-p", "no:cacheprovider"),
        *(
            "-W",
            "default",
            "--continue-on-collection-errors",
            "-o",
            f"pythonpath={staging.SITE}",
            f"--rootdir={staging.ROOT}",
            "--tb=short",
        ),
        *(f"--until={until}", f"--done={done}", *where),
        *([f"--of-backend={backend}"] if backend else []),
        *([f"--first={first}"] if first else []),
    ]
    environ = staging.environment(device)

    def begin(share: int) -> subprocess.Popen[bytes]:
        more = [f"--share={share}/{shares}", f"--journal={folder / f'{share}.jsonl'}"]
        with open(folder / f"{share}.log", "ab") as log:
            return subprocess.Popen(
                [*map(str, command), *more], cwd=staging.SITE, env=environ, stdout=log, stderr=subprocess.STDOUT
            )

    running = {share: begin(share) for share in range(shares)}
    while running:
        time.sleep(0.5)
        for share, process in list(running.items()):
            if time.time() > until + PATIENCE:
                process.kill()
                process.wait()
            status = process.poll()
            if status is None:
                continue
            del running[share]
            if status in (0, 1, 2, 5) or time.time() > until + PATIENCE:
                continue  # 2: interrupted, here by the time; 5: no tests
            if crashed(folder / f"{share}.jsonl", f"the process ended with status {status}: see {share}.log"):
                running[share] = begin(share)
    found = read(folder)
    for name, since in found.running.items():
        if time.time() - since > PATIENCE:
            _say(folder / "hung.jsonl", name, f"it did not end within {PATIENCE} s")
    return read(folder)


def crashed(journal: Path, why: str) -> bool:
    """Whether a process died in a test, or of one: the others of its share are still to be run."""
    if not journal.exists() or not journal.read_text():
        return False
    last = json.loads(journal.read_text().splitlines()[-1])
    if last.get("outcome") == "started":
        _say(journal, last["test"], why)
    return "test" in last


def _say(journal: Path, name: str, why: str) -> None:
    with journal.open("a") as file:
        file.write(json.dumps({"test": name, "outcome": "failed", "time": time.time(), "why": why}) + "\n")
