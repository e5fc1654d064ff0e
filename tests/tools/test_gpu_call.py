"""What `make gpu` does around the tests: journals that a later call goes on from, evidence, the selection of tests."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests" / "gpu"


@pytest.fixture
def shares(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    import shares

    return shares


def write(folder, *lines):
    (folder / "0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(test, outcome, **more):
    return {"test": test, "outcome": outcome, "time": 1.0, **more}


def test_a_journal_tells_what_is_left(shares, tmp_path):
    ends = [line("a", "started"), line("a", "passed"), line("b", "started"), line("b", "failed", why="off by one")]
    write(tmp_path, {"total": 4}, {"broken": "test_x.py", "why": "no such module"}, *ends, line("c", "started"))
    found = shares.read(tmp_path)
    assert found.broken == {"test_x.py": "no such module"}
    assert (found.passed, found.failed, found.left) == ({"a"}, {"b": "off by one"}, 2)
    assert list(found.running) == ["c"]


def test_the_test_in_which_a_process_died_has_failed(shares, tmp_path):
    write(tmp_path, {"total": 2}, line("a", "started"))
    assert shares.crashed(tmp_path / "0.jsonl", "it died")
    assert shares.read(tmp_path).failed == {"a": "it died"}
    write(tmp_path, {"total": 2})
    assert not shares.crashed(tmp_path / "0.jsonl", "it died before any test")


def item(name, path="test_values.py", **parameters):
    return SimpleNamespace(nodeid=name, name=name, path=Path(path), callspec=SimpleNamespace(params=parameters))


def selected(battery, items, **options):
    """Names of the items that a process runs."""
    given = {"--of-backend": None, "--until": 0.0, "--first": None, "--share": "0/1", "--done": None, "--journal": None}
    given |= {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    config = SimpleNamespace(getoption=given.__getitem__, hook=SimpleNamespace(pytest_deselected=lambda items: None))
    items = list(items)
    battery.Battery(config).pytest_collection_modifyitems(config, items)
    return [one.nodeid for one in items]


def test_shares_are_disjoint_complete_and_resumable(shares, tmp_path):
    import battery

    items = [item(f"t{k}", backend="cuda") for k in range(50)]
    names = [one.nodeid for one in items]
    parts = [selected(battery, items, share=f"{i}/3") for i in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(names)
    done = tmp_path / "done.txt"
    done.write_text("\n".join(parts[0]))
    assert sorted(selected(battery, items, done=done)) == sorted(parts[1] + parts[2])
    write(tmp_path, line("t3", "started"), line("t3", "passed"), line("t4", "started"))
    assert sorted(selected(battery, items, journal=tmp_path / "0.jsonl")) == sorted(set(names) - {"t3"})


def test_a_backends_tests_are_found_by_parameter_or_file(shares):
    import battery

    items = [
        item("by parameter", backend="triton"),
        item("another backend", backend="cuda"),
        item("by file", "test_triton_rows.py"),
        item("a case of another", "test_triton_rows.py", backend="cpu"),
        item("no backend"),
        item("test_bad_labels_raise_on_every_backend_on_a_cpu[x]", backend="triton"),
    ]
    assert selected(battery, items, of_backend="triton") == ["by parameter", "by file"]
    test_names = (ROOT / "tests").rglob("test_*.py")
    text = "".join(path.read_text() for path in test_names)
    assert all(f"def {name}" in text for name in battery.ONLY_CPU)


def environment():
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}


def test_evidence_has_machine_checks_and_samples_and_no_place(tmp_path):
    checks, out = tmp_path / "checks.json", tmp_path / "out"
    checks.write_text(json.dumps({"build": {"verdict": "red", "why": f"no compiler in {ROOT}/csrc"}}))
    command = [sys.executable, str(GPU / "evidence.py"), "--checks", str(checks), "--device", "cpu"]
    command += ["--commit", "0123456789", "--out", str(out), "--root", str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    (path,) = out.glob("*-0123456789.json")
    found = json.loads(path.read_text())
    assert found["checks"] == {"build": {"verdict": "red", "why": "no compiler in …/csrc"}}
    assert found["machine"]["torch"]
    assert found["results"] == []


def test_variants_are_samples_of_every_op():
    from op_db import RECORDS
    from variants import VARIANTS, variants_on

    assert VARIANTS.keys() == RECORDS.keys()
    for name, record in RECORDS.items():
        assert variants_on(record, "cuda") == list(VARIANTS[name])
