"""What `make gpu` does around the tests: its journal, processes that hang and die, a lost device, who tests what."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests" / "gpu"
sys.path.insert(0, str(GPU))  # where `make gpu` imports its own modules from

import battery  # noqa: E402
import items  # noqa: E402
import sanitizer  # noqa: E402
import staging  # noqa: E402
import supervise  # noqa: E402
import worker  # noqa: E402
from journal import GREEN, LOST, RED, Journal, mark, marked  # noqa: E402

#: A process that says what it is given, item by item: it passes, hangs, dies or loses its device.
STUB = f"""
import os, signal, sys, time
sys.path.insert(0, {str(GPU)!r})
from journal import GREEN, LOST, Journal, die_with_the_parent, mark
die_with_the_parent()
journal, items = Journal(__import__("pathlib").Path(sys.argv[1])), sys.argv[2].split(",")
journal.plan("part", sys.argv[3], len(items))
for item in items:
    if item in journal.ended("part"):
        continue
    if item == "stillborn":
        sys.exit(9)
    mark(item)
    if item.startswith("hangs"):
        time.sleep(600)
    if item.startswith("dies"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if item.startswith("loses"):
        journal.end("part", item, "red", "an illegal address")
        os._exit(LOST)
    if item.startswith("slow"):
        time.sleep(0.4)
    journal.end("part", item, GREEN)
    mark(None)
"""


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "stub.py"
    path.write_text(STUB)

    def supervisor(items, *, alive=lambda: True, seconds=300.0, patience=5.0, start=60.0):
        journal = Journal(tmp_path / "journal.jsonl")
        limits = supervise.Limits(time.time() + seconds, patience, start, poll=0.02)
        return supervise.Supervisor(
            "part",
            lambda share: [sys.executable, str(path), str(journal.path), items, share],
            dict(os.environ),
            journal,
            tmp_path / "marks",
            tmp_path / "log.txt",
            limits,
            alive,
        )

    return supervisor


def outcomes(supervisor):
    return {name: line["outcome"] for name, line in supervisor.journal.ended("part").items()}


# ----------------------------------------------------------------------------------------------------- processes


@pytest.mark.rest
def test_what_hangs_is_killed_and_named_and_the_rest_runs(stub):
    one = stub("a,hangs,b")
    (note,) = one.run(["all:0/1"])
    assert outcomes(one) == {"a": GREEN, "hangs": RED, "b": GREEN}
    assert note == "hangs: it did not end within 5 s"
    assert one.journal.ended("part")["hangs"]["why"] == "it did not end within 5 s"


def test_the_item_in_which_a_process_dies_is_red_and_the_rest_runs(stub):
    one = stub("dies,a,dies again,b")
    assert len(one.run(["all:0/1"])) == 2
    assert outcomes(one) == {"dies": RED, "a": GREEN, "dies again": RED, "b": GREEN}
    assert one.journal.ended("part")["dies"]["why"] == "its process ended with status -11"


def test_a_lost_context_ends_its_process_and_another_goes_on(stub):
    asked = []
    one = stub("loses,a", alive=lambda: asked.append(1) or True)
    one.run(["all:0/1"])
    assert outcomes(one) == {"loses": RED, "a": GREEN}
    assert one.journal.ended("part")["loses"]["why"] == "an illegal address"
    assert asked == [1]


def test_a_device_that_answers_to_no_process_ends_all(stub):
    one = stub("a,loses,b", alive=lambda: False)
    with pytest.raises(supervise.DeviceGoneError, match="no process since loses: it lost the device"):
        one.run(["all:0/1"])
    assert outcomes(one) == {"a": GREEN, "loses": RED}


def test_a_process_that_does_not_begin_is_not_started_for_ever(stub):
    one = stub("stillborn,a")
    one.run(["all:0/1"])
    assert outcomes(one) == {"process all:0/1": RED}
    assert "status 9" in one.journal.ended("part")["process all:0/1"]["why"]
    assert len(one.notes) == 2


def test_at_the_end_of_its_time_a_part_leaves_the_rest_open(stub, monkeypatch):
    """The time is over when the second item hangs, however long the first one took."""
    one = stub("a,hangs,b", seconds=600.0, patience=3600.0, start=3600.0)
    where = one.home / "part-all:0of1.mark"

    def clock():
        return time.time() + 1000 * (marked(where)[0] == "hangs")

    monkeypatch.setattr(supervise, "time", SimpleNamespace(time=clock, sleep=time.sleep))
    assert one.run(["all:0/1"]) == []
    assert outcomes(one) == {"a": GREEN}
    assert one.journal.total("part", ["all:0/1"]) == 3


@pytest.mark.rest
def test_a_killed_call_leaves_no_process_and_is_gone_on_with(stub, tmp_path):
    """SIGKILL of the parent: nothing of it can clean up."""
    one = stub("a,b,hangs")
    parent = textwrap.dedent(
        f"""
        import os, pathlib, sys, time
        sys.path.insert(0, {str(GPU)!r})
        import journal, supervise
        here = pathlib.Path({str(tmp_path)!r})
        command = [{sys.executable!r}, str(here / "stub.py"), str(here / "journal.jsonl"), "a,b,hangs"]
        supervise.Supervisor(
            "part", lambda share: [*command, share], dict(os.environ), journal.Journal(here / "journal.jsonl"),
            here / "marks", here / "log.txt", supervise.Limits(time.time() + 60, 60.0), lambda: True,
        ).run(["all:0/1"])
        """
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    where = tmp_path / "marks" / "part-all:0of1.mark"
    until = time.time() + 300
    while time.time() < until and not (where.exists() and marked(where)[0] == "hangs"):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = 1
    while left and time.time() < until:
        found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        left = sum(str(tmp_path / "stub.py") in line for line in found.splitlines())
        time.sleep(0.05)
    assert left == 0
    with one.journal.path.open("a") as file:
        file.write('{"part": "part", "item": "half a l')
    one.journal.mend()
    assert outcomes(one) == {"a": GREEN, "b": GREEN}
    one.run(["all:0/1"])
    assert outcomes(one) == {"a": GREEN, "b": GREEN, "hangs": RED}


# ------------------------------------------------------------------------------------------------------- journal


def test_a_journal_keeps_the_last_word_and_counts_what_is_left(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.plan("smoke", "cuda:0/2", 3)
    assert journal.total("smoke", ["cuda:0/2", "cuda:1/2"]) is None
    journal.plan("smoke", "cuda:1/2", 2)
    journal.end("smoke", "a", RED, "off by one")
    journal.end("smoke", "a", GREEN)
    journal.end("other", "b", GREEN)
    assert journal.total("smoke", ["cuda:0/2", "cuda:1/2"]) == 5
    assert {k: v["outcome"] for k, v in journal.ended("smoke").items()} == {"a": GREEN}


def test_a_long_reason_is_cut_so_that_the_journal_stays_a_file_that_comes_back(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j.jsonl")
    journal.end("p", "long", RED, "x" * 9999)
    assert len(journal.ended("p")["long"]["why"]) == 1500
    monkeypatch.setattr("journal.MANY_BYTES", 10)
    journal.end("p", "short", RED, "x" * 9999)
    assert len(journal.ended("p")["short"]["why"]) == 160


# -------------------------------------------------------------------------------------------------------- worker


def asked(**more):
    return SimpleNamespace(share="all:0/1", until=float("inf"), **more)


def raises(message):
    def run():
        raise ValueError(message)

    return run


def test_an_exception_ends_its_item_alone(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    found = {
        "a": raises("no\nmore"),
        "b": lambda: worker.outcome_of("", error=0.5),
        "c": lambda: worker.left_out("why"),
    }
    assert worker.work("p", found, journal, asked(), lost=lambda: False) == 0
    ended = journal.ended("p")
    assert (ended["a"]["outcome"], ended["a"]["why"]) == (RED, "ValueError: no")
    assert (ended["b"]["outcome"], ended["b"]["error"]) == (GREEN, 0.5)
    assert ended["c"]["outcome"] == "left out"
    assert worker.work("p", {"a": raises("again"), "d": lambda: worker.outcome_of("")}, journal, asked()) == 0
    assert journal.ended("p")["a"]["why"] == "ValueError: no"  # not run again
    assert journal.ended("p")["d"]["outcome"] == GREEN


def test_a_lost_device_ends_the_process_with_its_own_status(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j.jsonl")
    monkeypatch.setenv("MFD_GPU_MARK", str(tmp_path / "mark"))
    found = {"a": raises("illegal"), "b": lambda: worker.outcome_of("")}
    assert worker.work("p", found, journal, asked(), lost=lambda: True) == LOST
    assert list(journal.ended("p")) == ["a"]
    assert "the device no longer answers to this process" in journal.ended("p")["a"]["why"]
    assert marked(tmp_path / "mark")[0] == "a"


def test_nothing_begins_after_the_time(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    late = SimpleNamespace(share="all:0/1", until=0.0)
    assert worker.work("p", {"a": raises("never run")}, journal, late) == 0
    assert journal.ended("p") == {}
    assert journal.total("p", ["all:0/1"]) == 1


def test_a_process_without_a_gpu_has_not_lost_one(monkeypatch):
    assert not worker.device_is_lost()
    import fake_cuda

    with fake_cuda.installed():
        assert not worker.device_is_lost()
        fake_cuda.lose()
        assert worker.device_is_lost()


def test_the_smoke_test_meets_every_rung_op_and_dtype():
    found = items.smoke_workloads(items.RUNGS, items.DTYPES)
    assert len({w.name for w in found}) == len(found)
    for dtype in items.DTYPES:
        lengths = {w.sizes["classes"] for w in found if w.op == "distill_loss" and w.dtype == dtype}
        assert lengths == {130, 1100, 8191, 32000, 128256, 10**6 + 3}
    ops = {w.op for w in found}
    assert ops == {"distill_loss", "distill_terms", "topk_loss", "modal_pool", "feature_loss", "mfd_loss"}
    shares = [items.of("smoke", "cuda", f"triton:{i}/3", 0.0) for i in range(3)]
    assert sum(map(len, shares)) == len(found)
    assert len(set().union(*shares)) == len(found)


def test_a_rivals_failure_is_its_own():
    def entry(name, red=None):
        return {"name": name, "title": name, "red": red}

    found = {
        "measurements": [entry("mfd_fast:cuda", "off"), entry("liger", "off")],
        "left_out": {"compile": "it fails"},
    }
    assert items.wrong_in(found) == ["mfd_fast:cuda: off"]
    found = {"measurements": [], "left_out": {"mfd_fast:cuda": "it fails: x", "mfd_fast:triton": "out of memory"}}
    assert items.wrong_in(found) == ["mfd_fast:cuda: it fails: x"]


# -------------------------------------------------------------------------------------------------------- battery


def item(name, path="test_values.py", keywords=(), **parameters):
    callspec = SimpleNamespace(params=parameters)
    return SimpleNamespace(nodeid=name, name=name, path=Path(path), callspec=callspec, keywords=keywords)


def plugin(**options):
    given = {"--part": "p", "--of-backend": None, "--until": float("inf"), "--first": None, "--share": "0/1"}
    given |= {"--journal": None, **{f"--{name.replace('_', '-')}": value for name, value in options.items()}}
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    config = SimpleNamespace(getoption=given.__getitem__, hook=hook)
    return battery.Battery(config), config


@pytest.fixture(autouse=True)
def _no_parent(monkeypatch):
    monkeypatch.setattr(battery, "die_with_the_parent", lambda: None)


def selected(found, **options):
    """Names of the items that a process runs, in their order."""
    one, config = plugin(**options)
    found = list(found)
    one.pytest_collection_modifyitems(config, found)
    return [test.nodeid for test in found]


def test_shares_are_disjoint_complete_and_resumable(tmp_path):
    found = [item(f"t{k}", backend="cuda") for k in range(50)]
    names = [one.nodeid for one in found]
    parts = [selected(found, share=f"{i}/3") for i in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(names)
    journal = Journal(tmp_path / "j.jsonl")
    journal.end("p", "t3", GREEN)
    journal.end("another part", "t4", GREEN)
    assert sorted(selected(found, journal=journal.path)) == sorted(set(names) - {"t3"})
    assert journal.total("p", ["None:0/1"]) == 50
    assert selected(found, until=0.0) == []
    assert len(selected(found, first=4)) == 4


def test_values_and_gradients_come_first():
    names = ("test_autocast.py", "test_layouts.py", "test_values.py", "test_gradients.py")
    assert selected([item(name, name) for name in names]) == [names[2], names[3], names[1], names[0]]
    assert selected([item("slow", keywords=("rest",)), item("quick", "test_autocast.py")]) == ["quick", "slow"]
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert all(any(name.startswith(first) for name in there) for first in battery.FIRST)


def test_a_backends_tests_are_found_by_parameter_or_file():
    found = [
        item("by parameter", backend="triton"),
        item("another backend", backend="cuda"),
        item("by file", "test_triton_rows.py"),
        item("a case of another", "test_triton_rows.py", backend="cpu"),
        item("no backend"),
        item("test_bad_labels_raise_on_every_backend_on_a_cpu[x]", backend="triton"),
    ]
    assert selected(found, of_backend="triton") == ["by parameter", "by file"]
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert all(f"def {name}" in text for name in battery.ONLY_CPU)


def test_a_test_that_loses_the_device_ends_its_process(tmp_path, monkeypatch):
    ended = []
    journal = Journal(tmp_path / "j.jsonl")
    one, _ = plugin(journal=journal.path)
    monkeypatch.setattr(battery, "is_lost", lambda: True)
    monkeypatch.setattr(battery.os, "_exit", ended.append)
    for name, failed in (("good", False), ("bad", True)):
        one.pytest_runtest_logstart(name)
        report = SimpleNamespace(nodeid=name, failed=failed, skipped=False, longrepr="E  illegal address")
        one.pytest_runtest_logreport(report)
        one.pytest_runtest_logfinish(name)
    assert ended == [LOST]
    assert journal.ended("p")["good"]["outcome"] == GREEN
    assert journal.ended("p")["bad"]["why"].endswith("the device no longer answers to this process")


def test_a_file_that_cannot_be_imported_is_red(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    one, _ = plugin(journal=journal.path)
    one.pytest_collectreport(SimpleNamespace(failed=True, nodeid="test_x.py", longrepr="no module y"))
    assert journal.ended("p")["test_x.py"]["why"] == "it cannot be imported: no module y"


def test_only_a_gpu_is_lost(monkeypatch):
    import fake_cuda

    monkeypatch.setenv("MFD_FAST_TEST_DEVICE", "cpu")
    assert not battery.is_lost()
    monkeypatch.setenv("MFD_FAST_TEST_DEVICE", "cuda")
    with fake_cuda.installed():
        assert not battery.is_lost()
        fake_cuda.lose()
        assert battery.is_lost()


def test_variants_are_samples_of_every_op():
    from op_db import RECORDS
    from variants import VARIANTS, variants_on

    assert VARIANTS.keys() == RECORDS.keys()
    for name, record in RECORDS.items():
        assert variants_on(record, "cuda") == list(VARIANTS[name])


# ------------------------------------------------------------------------------------------------------ sanitizer


def said(monkeypatch, text):
    calls = []
    monkeypatch.setattr(sanitizer, "find", lambda device: ["compute-sanitizer"])
    monkeypatch.setattr(sanitizer, "call", lambda command, device, until: calls.append(command) or text)
    return calls


def test_a_tool_that_does_not_see_the_planted_fault_is_blind(monkeypatch):
    said(monkeypatch, "planted memcheck\n========= ERROR SUMMARY: 0 errors\n")
    found = sanitizer.planted("memcheck", "cpu", 0.0)
    assert found["outcome"] == "red"
    assert found["why"] == "memcheck is blind: it reports no error of a planted fault"
    calls = said(monkeypatch, "========= RACECHECK SUMMARY: 1 hazard displayed\n")
    assert sanitizer.planted("racecheck", "cpu", 0.0)["outcome"] == "green"
    assert calls[0][:5] == ["compute-sanitizer", "--tool", "racecheck", "--kernel-name", "kns=mfd6device"]


def test_a_filter_that_matches_no_kernel_is_red(monkeypatch):
    said(monkeypatch, "kernel void at::native::fill<float>(float*)\n28 calls\n")
    found = sanitizer.names("cuda", 0.0)
    assert found["outcome"] == "red"
    assert found["why"].startswith("of 1 kernels none has mfd::device in its name")
    said(monkeypatch, "kernel void mfd::device::rows<float, 1>(Problem)\n28 calls\n")
    assert sanitizer.names("cuda", 0.0) == {"outcome": "green", "kernels": ["void mfd::device::rows"]}


def test_the_filters_name_is_that_of_our_kernels():
    """Mangled: a length before every name, so mfd::device is 3mfd6device."""
    sources = list((ROOT / "kernels" / "cuda").rglob("*.cuh"))
    assert sources
    for path in [*sources, GPU / "planted.cu"]:
        text = path.read_text()
        if "__global__" in text:
            assert "namespace mfd {\nnamespace device {" in text, path
    assert "3mfd6device".endswith(sanitizer.OURS)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("28 calls\nERROR SUMMARY: 0 errors\nexit status 0", "green"),
        ("28 calls\nERROR SUMMARY: 2 errors\nexit status 0", "red"),
        ("ERROR SUMMARY: 0 errors\nexit status 1", "red"),
        ("28 calls\nit was not done after 40 s", "red"),
    ],
)
def test_samples_are_green_only_where_the_tool_ended_and_found_nothing(monkeypatch, text, outcome):
    said(monkeypatch, text)
    assert sanitizer.samples("memcheck", "cpu", 0.0)["outcome"] == outcome


def test_no_sanitizer_is_red(monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    for found in (sanitizer.samples("memcheck", "cuda", 0.0), sanitizer.under("memcheck", [], "cuda", 0.0)):
        assert found["why"].startswith("compute-sanitizer was not found")


def test_a_tool_that_takes_too_long_is_said(monkeypatch):
    monkeypatch.setattr(staging, "environment", lambda device, emulate: dict(os.environ))
    monkeypatch.setattr(staging, "SITE", ROOT)
    monkeypatch.setattr(sanitizer, "PATIENCE", 0.0)
    said = sanitizer.call([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], "cpu", 0.0)
    assert said.endswith("it was not done after 1 s")
    assert "No such file" in sanitizer.call(["/nowhere/tool"], "cpu", 0.0)


# ---------------------------------------------------------------------------------------------------- whole calls


def test_the_mark_is_read_as_it_was_written(tmp_path):
    mark("an item", tmp_path / "m")
    assert marked(tmp_path / "m")[0] == "an item"
    mark(None, tmp_path / "m")
    assert marked(tmp_path / "m")[0] is None


@pytest.mark.rest
def test_a_rehearsal_runs_every_part(tmp_path):
    """All of it, small, on the CPU: what is green here has run every line that a GPU does not decide."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    command = [sys.executable, str(GPU), "--device", "cpu", "--minutes", "20", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    found = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    checks = found["checks"]
    assert list(checks) == ["build", "facts", "smoke", "speed", "compare", "battery", "streams", "sanitizer"]
    assert all(check["verdict"] == "green" and check["not_reached"] == 0 for check in checks.values())
    assert len(found["results"]) == len(found["first_timings"]) > 0
    assert found["machine"]["gpu"] == "a CPU that plays a GPU"
    assert found["ceilings"]["gemm_dtype"] == "bfloat16"
    assert str(ROOT) not in (tmp_path / "results.json").read_text()
    files = list(tmp_path.iterdir())
    assert len(files) <= 8
    assert all(path.stat().st_size < 16 << 20 for path in files)
    assert len(done.stdout.splitlines()) <= 60 + len(checks)
    again = subprocess.run(command, capture_output=True, text=True, env=environ)  # nothing is left to do
    assert again.returncode == 0
    assert "facts" not in again.stdout.split("torch")[0]
