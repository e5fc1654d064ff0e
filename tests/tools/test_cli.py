"""The command line where terminals are plain, machines busy, packages missing and users impatient."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import bench_samples
import pytest

import mfd_fast as mfd
from mfd_fast import cli, demo
from mfd_fast.bench import command, results, screen
from mfd_fast.demo import plot, report

TINY = ["distill_loss", "--rows", "2", "--classes", "3", "--seconds", "0.05", "--against", "eager"]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mfd_fast.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=600,
    )


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"mfd-fast {mfd.__version__}\n"


@pytest.mark.rest
def test_an_ascii_terminal_gets_plain_characters():
    done = run("bench", *TINY, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode("ascii")
    assert " us" in text
    assert "?" not in text


@pytest.mark.parametrize("seconds", [0.1, 5])
@pytest.mark.rest
def test_ctrl_c_ends_the_demo_quietly(seconds, tmp_path):
    """SIGINT to the whole group, as a terminal sends it, while worker processes start and train."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "mfd_fast.cli", "demo", "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout.readline()
    time.sleep(seconds)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, error = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == cli.INTERRUPTED
    assert error.strip() == "mfd-fast: interrupted"


def test_an_interrupt_anywhere_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "describe", interrupted)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "\nmfd-fast: interrupted\n"


@pytest.mark.rest
def test_a_reader_that_goes_away_is_no_error():
    """rich has its own way; without it the output is print's."""
    plain = "import importlib.util, sys; from mfd_fast import cli; importlib.util.find_spec = lambda *_: None"
    read, written = os.pipe()
    with os.fdopen(written, "w") as away:
        os.close(read)
        code = f"{plain}; sys.exit(cli.main(['env']))"
        python = subprocess.run([sys.executable, "-c", code], stdout=away, stderr=subprocess.PIPE)
    assert python.stderr == b""
    assert python.returncode == cli.UNREAD


@pytest.mark.parametrize("where", ["folder", "file/below.json"])
def test_json_is_checked_before_the_measuring(where, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    assert command.main([*TINY, "--json", str(tmp_path / where)]) == 1
    assert str(tmp_path / where.split("/")[0]) in capsys.readouterr().err


def test_checking_a_path_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "result.json"
    results.check_writable(path)
    assert not path.exists()
    path.write_text("{}")
    results.check_writable(path)
    assert path.read_text() == "{}"


def test_help_of_the_demo_needs_none_of_its_packages(monkeypatch, capsys):
    monkeypatch.setattr(demo, "missing_packages", lambda: ["matplotlib"])
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["demo", "--help"])
    assert "--seeds" in capsys.readouterr().out
    assert cli.main(["demo"]) == 1
    assert "needs matplotlib: pip install 'mfd-fast[demo]'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- a verdict's factors


def sample(own=(1.0, 1.0, 1.0), eager=(198.0, 198.0, 198.0)):
    """q1, median, q3 of mfd_fast and of eager."""
    result = json.loads(json.dumps(bench_samples.document()["results"][0]))
    keep = []
    for m in result["measurements"]:
        times = {result["primary"]: own, "eager": eager}.get(m["name"])
        if times is not None:
            keep.append(m | dict(zip(("q1", "median", "q3"), times, strict=True)))
    result["measurements"] = keep
    return result


def test_a_busy_machine_gives_no_factor():
    result = sample()
    assert "198 x as fast as eager PyTorch" in results.verdict(result, 0.02)
    said = results.verdict(result, 0.6)
    assert "198 x" not in said
    assert "faster than eager PyTorch in these runs; by how much cannot be said while other processes take 60 %" in said
    assert "SLOWER than eager PyTorch in these runs" in results.verdict(sample(eager=(0.5, 0.5, 0.5)), 0.6)
    assert not any("198" in cell for row in screen.rows(result, 0.6) for cell in row if " x " in cell)
    assert any("198 x as fast" in cell for row in screen.rows(result, 0.0) for cell in row)


def test_noise_makes_a_factor_a_range():
    said = results.verdict(sample(own=(1.0, 1.1, 2.0), eager=(10.0, 11.0, 12.0)), 0.0)
    assert "5.00 to 12.0 x as fast as eager PyTorch" in said
    said = results.verdict(sample(own=(1.0, 1.5, 4.0), eager=(2.0, 3.0, 6.0)), 0.0)
    assert "as fast as eager PyTorch within the noise (0.50 to 6.00 x)" in said
    said = results.verdict(sample(own=(4.0, 5.0, 8.0), eager=(1.0, 1.1, 2.0)), 0.0)
    assert "SLOWER than eager PyTorch (0.12 to 0.50 x)" in said


# ------------------------------------------------------------------------------------------------ the demo's picture


@pytest.mark.parametrize("close", [True, False])
def test_no_two_texts_of_the_times_overlap(close):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("student step, 64 rows", "mfd_loss 64x3x32, 10", "distill_loss 1024x1000", "distill_loss 512x8192")
    factor = 1.01 if close else 12.3
    timings = [
        {"what": what, "backend": "cpu", "mfd_fast_ms": ms, "eager_ms": factor * ms, "compile_ms": factor**2 * ms}
        for what, ms in zip(names, (0.131, 0.41, 1.06, 123.0), strict=True)
    ]
    score = {"mean": 0.9, "standard_error": 0.01}
    gain = {"differences": [0.1, 0.2], "mean": 0.15, "half_width": 0.1, "corrected_half_width": 0.2}
    conditions = ("all sensors", "without left half", "without right half", "without spectrum")
    found = {
        "summary": {arm: dict.fromkeys(conditions, score) for arm in report.TITLES},
        "seeds": [0, 1],
        "paired": {"distilled - alone": dict.fromkeys(conditions, gain)},
        "timings": timings,
        "machine": {"threads": 2},
    }
    figure = plot.draw(found, report.TITLES)
    figure.set_dpi(800 / figure.get_size_inches()[0])
    figure.draw_without_rendering()
    axis = next(a for a in figure.axes if a.get_xscale() == "log")
    low, high = axis.get_xlim()
    ticks = [t for t in axis.get_xticklabels() if t.get_text() and low <= t.get_position()[0] <= high]
    texts = [*axis.texts, *axis.get_yticklabels(), *ticks, *axis.get_legend().get_texts()]
    assert len(axis.texts) == 3 * len(timings)
    inside = figure.bbox
    for text in texts:
        box = text.get_window_extent()
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1, text.get_text()
        assert box.height >= 8 * text.get_text().count("\n") + 8, "too small to read at 800 pixels"
    for a, b in itertools.combinations(texts, 2):
        assert not a.get_window_extent().overlaps(b.get_window_extent()), (a.get_text(), b.get_text())
    plt.close(figure)
