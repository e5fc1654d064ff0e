"""What `make versions` runs and what it says that it leaves out, without an environment or a build."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import versions  # noqa: E402


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the tool where PyTorch ``offered`` can be had, Python 3.90 has one and 3.91 has none: status and names."""

    def call(offered, status=0):
        names = []
        torch_of = {"env": offered, "python3.90": "9.8"}
        pythons = {"3.90": Path("python3.90"), "3.91": Path("python3.91")}
        monkeypatch.setattr(sys, "argv", ["versions.py"])
        monkeypatch.setattr(versions, "PLACE", tmp_path)
        monkeypatch.setattr(versions, "newer_pythons", lambda: pythons)
        monkeypatch.setattr(versions, "asked", lambda python, code: torch_of.get(str(python)))
        monkeypatch.setattr(versions, "environment", lambda name, python, system: python if system else Path("env"))
        monkeypatch.setattr(versions, "wheel", lambda python, version: Path(f"wheel-{version}"))
        monkeypatch.setattr(versions, "emulator", lambda: "emulated")
        monkeypatch.setattr(versions, "run", lambda *command: None)
        monkeypatch.setattr(versions, "sample", lambda python, name, *_, **__: names.append(name) or status)
        return versions.main(), names

    return call


def test_each_python_with_a_pytorch_runs_and_the_others_are_named(run, capsys):
    assert run("9.9") == (0, [f"python-{versions.HERE}", "python-3.90"])
    assert capsys.readouterr().out.count("left out") == 1


def test_the_pinned_pytorch_is_not_run_again(run, capsys):
    assert run(versions.pinned("torch")) == (0, ["python-3.90"])
    said = capsys.readouterr().out
    assert "left out: a newer PyTorch: the installer offers" in said
    assert "left out: Python 3.91: it has no PyTorch" in said


def test_a_failed_sample_fails_the_tool(run, capsys):
    assert run("9.9", status=1)[0] == 1
    assert "failed: python-3.90" in capsys.readouterr().out


def test_constraints_leave_pytorch_and_its_own_packages_free(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "PLACE", tmp_path)
    kept = versions.constraints().read_text()
    assert "pytest==" in kept
    assert not any(line.startswith(("torch==", "triton==")) for line in kept.splitlines())


def test_the_tests_are_copied_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "PLACE", tmp_path)
    monkeypatch.setattr(versions, "COPIED", ("pyproject.toml", "tests/support"))
    tree = versions.tree()
    assert (tree / "pyproject.toml").exists()
    assert not (tree / "mfd_fast").exists()
