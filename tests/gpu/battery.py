"""pytest plugin of `make gpu`: a share of one backend's tests, until a time, every verdict in a journal at once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

#: Tests of a backend that mean a CPU, and why.
ONLY_CPU = {
    "test_bad_labels_raise_on_every_backend_on_a_cpu": "labels are not read back from a GPU: test_gpu_values.py",
    "test_thread_count_does_not_change_a_bit": "threads of the CPU",
}
#: Folders and files without tests of a backend on a device; `tests/gpu` and the emulator have their own.
NOT_HERE = (
    *("gpu", "cuda_emulator", "backends/cpu", "backends/cuda", "backends/test_backends*", "integration/test_compile*"),
    *("machine_code", "packaging", "tools"),
)
#: Exit status of a process whose device no longer answers.
LOST = 70


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("make gpu")
    group.addoption("--of-backend", help="only the tests of this backend")
    group.addoption("--share", default="0/1", help="I/N: every N-th group of tests")
    group.addoption("--until", type=float, default=float("inf"), help="start no test after this time (of time.time)")
    group.addoption("--done", type=Path, help="tests that are named in this file are left out")
    group.addoption("--journal", type=Path, help="append verdicts to this file")
    group.addoption("--first", type=int, help="only so many tests, spread over all (rehearsals)")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Battery(config))


def is_of(item: pytest.Item, backend: str) -> bool:
    """By its parameter ``backend``, or else by the name of its file."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "backend" in parameters:
        return bool(parameters["backend"] == backend)
    return item.path.name.startswith(f"test_{backend}_")


class Battery:
    """Selects, stops in time, and writes the journal: a line when a test begins, another with its outcome."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.backend, self.until, self.first = option("--of-backend"), option("--until"), option("--first")
        self.share, self.shares = map(int, option("--share").split("/"))
        done, journal = option("--done"), option("--journal")
        self.done = set(done.read_text().splitlines()) if done and done.exists() else set()
        # A process that takes up a dead one's share leaves out what that one has done.
        self.before = outcomes(journal) if journal and journal.exists() else set()
        self.journal = journal
        self.outcome: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [
            item
            for item in items
            if (self.backend is None or is_of(item, self.backend))
            and not any(item.name.startswith(name) for name in ONLY_CPU)
        ]
        if self.first:
            chosen = chosen[:: max(len(chosen) // self.first, 1)]
        left = [item for item in chosen if item.nodeid not in self.done]
        mine = [item for place, item in enumerate(left) if place // 8 % self.shares == self.share]
        mine = [item for item in mine if item.nodeid not in self.before]
        self.say(total=len(chosen))
        kept = {item.nodeid for item in mine}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = mine

    def say(self, **fields: object) -> None:
        if self.journal:
            with self.journal.open("a") as file:
                file.write(json.dumps(fields) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say(broken=report.nodeid, why=str(report.longrepr)[-3000:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome.pop(nodeid, None)
        self.say(test=nodeid, outcome="started", time=time.time())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome[report.nodeid] = str(report.longrepr)[-3000:]
        elif report.skipped:
            self.outcome[report.nodeid] = "skipped"

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        wrong = self.outcome.get(nodeid)
        more = {"why": wrong} if wrong else {}
        self.say(test=nodeid, outcome="failed" if wrong else "passed", time=time.time(), **more)
        if wrong and is_lost():
            os._exit(LOST)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.time() > self.until:
            item.session.shouldstop = "the time of this call is over"


def outcomes(journal: Path) -> set[str]:
    """The tests that have one."""
    said = map(json.loads, journal.read_text().splitlines())
    return {line["test"] for line in said if line.get("outcome") in ("passed", "failed")}


def is_lost() -> bool:
    """An illegal access leaves the process without its device."""
    import torch

    if os.environ.get("MFD_FAST_TEST_DEVICE") != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
