"""pytest plugin of `make gpu`: a share of one backend's tests, until a time, every verdict in the journal at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from journal import GREEN, LEFT_OUT, LOST, RED, Journal, die_with_the_parent, mark

#: Tests of a backend that mean a CPU, and why.
ONLY_CPU = {
    "test_bad_labels_raise_on_every_backend_on_a_cpu": "labels are not read back from a GPU: test_gpu_values.py",
    "test_thread_count_does_not_change_a_bit": "threads of the CPU",
}
#: How the names of files begin whose tests come first, and those of tests/gpu.
FIRST = (
    *(
        "test_values",
        "test_gradients",
        "test_layouts",
        "test_special_values",
        "test_special_fusion",
        "test_divergences",
    ),
    *("test_gpu_streams", "test_gpu_large", "test_gpu_values"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("make gpu")
    group.addoption("--part", default="battery", help="name of the part in the journal")
    group.addoption("--of-backend", help="only the tests of this backend")
    group.addoption("--share", default="0/1", help="I/N: every N-th test")
    group.addoption("--until", type=float, default=float("inf"), help="start no test after this time (of time.time)")
    group.addoption("--journal", type=Path, help="append verdicts to this file; leave out the tests that it has")
    group.addoption("--first", type=int, help="only so many tests, spread over all (rehearsals)")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Battery(config))


def is_of(item: pytest.Item, backend: str) -> bool:
    """By its parameter ``backend``, or else by the name of its file."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "backend" in parameters:
        return bool(parameters["backend"] == backend)
    return item.path.name.startswith(f"test_{backend}_")


def rank(item: pytest.Item) -> tuple[bool, int]:
    """Sorts the quick tier before the rest, and each by its files."""
    place = next((k for k, name in enumerate(FIRST) if item.path.name.startswith(name)), len(FIRST))
    return "rest" in item.keywords, place


class Battery:
    """Selects, orders, stops in time, and writes the journal."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.part, self.backend = option("--part"), option("--of-backend")
        self.until, self.first = option("--until"), option("--first")
        self.share = option("--share")
        self.journal = Journal(option("--journal")) if option("--journal") else None
        self.outcome: dict[str, tuple[str, str]] = {}
        self.begin: dict[str, float] = {}
        die_with_the_parent()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [
            item
            for item in items
            if (self.backend is None or is_of(item, self.backend))
            and not any(item.name.startswith(name) for name in ONLY_CPU)
        ]
        chosen.sort(key=rank)
        if self.first:
            chosen = chosen[:: max(len(chosen) // self.first, 1)][: self.first]
        index, count = map(int, self.share.split("/"))
        mine = chosen[index::count]
        done = {}
        if self.journal:
            self.journal.plan(self.part, f"{self.backend}:{self.share}", len(mine))
            done = self.journal.ended(self.part)
        left = [item for item in mine if item.nodeid not in done]
        kept = {item.nodeid for item in left}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = left if time.time() < self.until else []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.journal:
            self.journal.end(self.part, report.nodeid, RED, f"it cannot be imported: {report.longrepr}", extra=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome[nodeid] = (GREEN, "")
        self.begin[nodeid] = time.time()
        mark(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome[report.nodeid] = (RED, str(report.longrepr))
        elif report.skipped:
            self.outcome[report.nodeid] = (LEFT_OUT, str(report.longrepr))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, why = self.outcome.pop(nodeid)
        gone = outcome == RED and is_lost()
        if gone:
            why += "\nthe device no longer answers to this process"
        if self.journal:
            seconds = round(time.time() - self.begin.pop(nodeid), 3)
            self.journal.end(self.part, nodeid, outcome, why, seconds=seconds)
        if gone:
            os._exit(LOST)
        mark(None)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.time() > self.until:
            item.session.shouldstop = "the time of this call is spent"


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
