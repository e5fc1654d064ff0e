"""One call of `make gpu` from its first to its last line: budgets, what a part may raise, what a later call finds."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

import parts
import staging
from journal import GREEN, RED, Journal
from supervise import DeviceGoneError

GPU = Path(__file__).resolve().parents[1] / "gpu"
spec = importlib.util.spec_from_file_location("gpu_call", GPU / "__main__.py")
call = importlib.util.module_from_spec(spec)
spec.loader.exec_module(call)

PARTS = tuple(parts.Part(name, seconds, 1, ("all:0/1",), ("all:0/1",)) for name, seconds in (("a", 10), ("b", 30)))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """``run(work)`` makes a call whose parts do ``work(run, part, until)``; returns its exit status."""
    monkeypatch.setattr(parts, "PARTS", PARTS)
    monkeypatch.setattr(staging, "module", lambda device: tmp_path / "_C.so")
    monkeypatch.setattr(staging, "lay_out", lambda module: None)
    monkeypatch.setattr(call, "digest", lambda: "sources")

    def made(work, *more):
        monkeypatch.setattr(call.Run, "supervise", lambda self, part, until: work(self, part, until))
        return call.main(["--device", "cpu", "--results", str(tmp_path / "out"), *more])

    made.folder = tmp_path / "out"
    return made


def ends(run, part, outcome=GREEN, of=1):
    run.journal.plan(part.name, "all:0/1", of)
    run.journal.end(part.name, "one", outcome, "a reason" if outcome == RED else "")


def checks(run):
    return json.loads((run.folder / "results.json").read_text())["checks"]


def test_a_green_call_ends_with_0_and_another_has_nothing_to_do(run, capsys):
    worked = []

    def work(self, part, until):
        worked.append(part.name)
        ends(self, part)

    assert run(work) == 0
    assert worked == ["a", "b"]
    assert {name: check["verdict"] for name, check in checks(run).items()} == dict.fromkeys(
        ("build", "a", "b"), "green"
    )
    assert (run.folder / "report.txt").read_text().splitlines() == capsys.readouterr().out.splitlines()[-4:]
    assert run(work) == 0
    assert worked == ["a", "b"]
    assert run(work, "--fresh") == 0
    assert worked == ["a", "b", "a", "b"]


def test_the_time_is_shared_by_worth_and_what_is_left_goes_on(run):
    """8 minutes for 10 s and 30 s: 120 s and 360 s, and all of the first part's to the second."""
    given, begin = {}, time.time()

    def work(self, part, until):
        given[part.name] = until - begin
        ends(self, part)

    run(work, "--minutes", "8")
    assert given == {"a": pytest.approx(120, abs=5), "b": pytest.approx(480, abs=5)}
    given.clear()
    run(work, "--minutes", "8", "--part", "b", "--fresh")
    assert given == {"b": pytest.approx(480, abs=5)}


def test_without_time_nothing_begins(run):
    assert run(lambda *_: pytest.fail("a part began"), "--minutes", "0") == call.AGAIN


def test_results_are_written_after_every_part(run):
    def work(self, part, until):
        if part.name == "b":
            assert checks(run)["a"]["verdict"] == "green"
        ends(self, part)

    assert run(work) == 0


def test_a_part_that_raises_is_red_and_the_next_one_runs(run):
    def work(self, part, until):
        if part.name == "a":
            raise ZeroDivisionError("no budget")
        ends(self, part)

    assert run(work) == call.RED_STATUS
    assert checks(run)["a"]["why"] == {"the part itself": "ZeroDivisionError: no budget"}
    assert checks(run)["b"]["verdict"] == "green"


def test_a_red_item_ends_the_call_with_1_and_an_open_one_with_3(run):
    assert run(lambda self, part, until: ends(self, part, of=2)) == call.AGAIN
    assert checks(run)["a"]["not_reached"] == 1
    assert run(lambda self, part, until: ends(self, part, RED, of=2)) == call.RED_STATUS


def test_a_gpu_that_is_gone_stops_the_call(run, capsys):
    def work(self, part, until):
        ends(self, part, of=2)
        raise DeviceGoneError("the device answers to no process since one")

    assert run(work) == call.GONE
    assert list(checks(run)) == ["build", "a"]
    assert "STOPPED: the device answers to no process since one" in capsys.readouterr().out.splitlines()


def test_a_call_that_is_ended_from_outside_still_reports(run, capsys):
    def work(self, part, until):
        ends(self, part, of=2)
        raise KeyboardInterrupt

    assert run(work) == call.GONE
    assert "STOPPED: this call was ended from outside" in capsys.readouterr().out


def test_without_a_native_module_the_rest_runs(run, monkeypatch):
    def fails(self):
        raise RuntimeError("nvcc was not found")

    monkeypatch.setattr(staging, "module", lambda device: None)
    monkeypatch.setattr(call.Run, "build", fails)
    assert run(lambda self, part, until: ends(self, part)) == call.RED_STATUS
    assert checks(run)["build"]["why"] == {
        "native module": "the native module was not built: RuntimeError: nvcc was not found"
    }
    assert checks(run)["b"]["verdict"] == "green"


def test_a_build_that_fails_leaves_its_words_in_the_log(run, monkeypatch):
    monkeypatch.setattr(staging, "module", lambda device: None)
    monkeypatch.setattr(call.sys, "executable", "/bin/false")
    assert run(lambda self, part, until: ends(self, part)) == call.RED_STATUS
    assert "CalledProcessError" in checks(run)["build"]["why"]["native module"]
    assert (run.folder / "log.txt").exists()


def test_results_of_other_sources_are_set_aside(run, monkeypatch):
    assert run(lambda self, part, until: ends(self, part, RED)) == call.RED_STATUS
    monkeypatch.setattr(call, "digest", lambda: "mended sources")
    assert run(lambda self, part, until: ends(self, part)) == 0
    aside = Journal(run.folder / "journal-of-other-sources.jsonl")
    assert aside.ended("a")["one"]["outcome"] == RED


def test_a_copy_of_earlier_results_is_gone_on_with(run, tmp_path):
    worked = []
    run(lambda self, part, until: ends(self, part) if part.name == "a" else None)
    run.folder.rename(tmp_path / "earlier")

    def work(self, part, until):
        worked.append(part.name)
        ends(self, part)

    assert run(work, "--before", str(tmp_path / "earlier")) == 0
    assert worked == ["b"]


def test_a_long_log_loses_its_beginning(run, monkeypatch):
    monkeypatch.setattr(call, "LOG_BYTES", 100)

    def work(self, part, until):
        self.log.write_bytes(b"x" * 300 + b"end")
        self.cut_the_log()
        assert self.log.read_bytes() == b"x" * 47 + b"end"
        ends(self, part)

    assert run(work) == 0


def test_a_gpu_is_asked_by_a_fresh_process(run, monkeypatch):
    def work(self, part, until):
        assert self.alive()  # a rehearsal has no GPU to lose
        self.device = "cuda"
        monkeypatch.setattr(call, "PROBE", "pass")
        assert self.alive()
        monkeypatch.setattr(call, "PROBE", "raise SystemExit(1)")
        assert not self.alive()
        self.device = "cpu"
        ends(self, part)

    assert run(work) == 0


def test_a_carried_module_serves_only_its_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(staging, "HOME", tmp_path)
    built = staging.native("cuda")
    built.mkdir(parents=True)
    (built / "_C.so").write_text("no module at all")
    assert staging.module("cuda") is None
    (built / "_C.sources").write_text(staging.sources())
    assert staging.module("cuda") is None  # it does not load


def test_every_part_fits_into_nine_minutes_and_says_what_it_runs(tmp_path):
    monkeyed = importlib.util.spec_from_file_location("parts_as_they_are", GPU / "parts.py")
    real = importlib.util.module_from_spec(monkeyed)
    sys.modules["parts_as_they_are"] = real
    monkeyed.loader.exec_module(real)
    assert sum(part.seconds for part in real.PARTS) <= 9 * 60
    names = [part.name for part in real.PARTS]
    assert names == ["facts", "smoke", "speed", "compare", "battery", "streams", "sanitizer"]
    for part in real.PARTS:
        assert len(part.shares) <= 8
        command = real.command(part, part.shares[0], "cuda", 5.0, tmp_path / "j")
        assert "--until=5.0" in command
        assert ("pytest" in command) == (part.tests is not None)
        assert not any(word.startswith("--first") for word in command)
