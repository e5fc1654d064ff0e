"""Tables, CSV, pictures and the published page, from a hand-written result file; and the page that is published."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import bench_samples
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import plots, report, run, suites
from mfd_fast.bench import machine, results
from mfd_fast.bench.workloads import Workload

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "earlier.json"
    results.save(bench_samples.document(), path)
    return path


def test_what_is_slower_comes_first():
    text = report.render(bench_samples.document(), "raw.json", ["a.svg"])
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles[:3] == ["Slower than a rival", "Red gates", "Missed targets"]
    assert titles[3:] == ["distill_loss", "mfd_loss", "Cost growth", "Not measured", "How it is measured"]
    slower = text.split("## Red gates")[0]
    assert "| `mfd_loss 256x3x512x100 float32` | reference | torch.compile | 6 ms | 3 ms | 0.50 x |" in slower
    assert "distill_loss 4096x1000" not in slower.split("## Slower")[1]


def test_the_page_has_targets_beside_what_was_measured():
    text = report.render(bench_samples.document(), "raw.json", [])
    assert "| `distill_loss 4096x1000 float32` | cpu | x floor | 2.00 | ≤ 1.4 |" in text
    assert "| `mfd_loss 256x3x512x100 float32` | reference | x eager | 1.50 | ≥ 3 |" in text
    assert "`4096x1000 float32` | cpu | 2 ms | 1 ms | 2.00 | ≤ 1.4 | 10.0 x | ≥ 9 |" in text
    assert "| `64x100 float32` | cpu | RED |" in text
    assert "25 % of the processors" in text
    assert "SUPER-LINEAR memory" in text
    assert "`fla` is missing: fla-core needs a GPU" in text
    assert "`distill_loss 9x9 float32` is left out: out of memory" in text
    assert "python -m benchmarks --suite cpu --growth --publish" in text


def test_a_red_gate_has_no_number():
    found = bench_samples.document()["results"]
    assert results.speed_up(found[0], "liger") is None
    assert results.primary(found[2]) is None
    assert results.verdict(found[2]).startswith("WRONG")
    assert results.targets(found[0])[0].met is False
    assert str(results.targets(found[0])[1]) == "x eager 10.0 (target ≥ 9)"


def test_an_earlier_file_is_shown_written_and_compared(file, tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = ["--from", str(file), "--report", str(folder), "--csv", str(tmp_path / "a.csv"), "--compare", str(file)]
    assert command.main(arguments) == 1  # mfd_fast itself is red somewhere
    said = capsys.readouterr().out
    assert "RED distill_loss 64x100 float32: mfd_fast (cpu): a row is off" in said
    assert "0.50 x SLOWER" in said
    assert "times as long as before, measured in eager: as before" in said
    names = {path.name for path in folder.iterdir()}
    pictures = {f"{name}.{kind}" for name in ("speed_up", "roofline", "scaling") for kind in ("png", "svg")}
    assert names == pictures | {"performance.md", "results.json", "results.csv"}
    assert (folder / "speed_up.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()))
    assert len(lines) == 8
    assert {line["gate"] for line in lines} == {"green", "red"}
    assert lines[1]["mfd_fast_speed_up"] == "10.0"
    assert json.loads((folder / "results.json").read_text()) == bench_samples.document()


def test_a_slower_run_has_its_exit_status(file, tmp_path):
    found = bench_samples.document()
    found["results"] = found["results"][:1]
    results.save(found, file)
    found["results"][0]["measurements"][0]["median"] *= 2
    results.save(found, tmp_path / "later.json")
    assert command.main(["--from", str(tmp_path / "later.json"), "--compare", str(file)]) == 2


def test_pictures_depend_on_the_data_alone(tmp_path):
    first, second = (plots.draw(bench_samples.document(), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_errors_are_sentences(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("{}")
    for arguments, words in (
        (["--from", str(tmp_path / "none.json")], "No such file"),
        (["--from", str(other)], "not a result file"),
        (["--only", "nothing of that name"], "no workload of this suite has that name"),
        (["--quick", "--against", "egar"], "--against egar: unknown"),
        (["--suite", "gpu", "--device", "cuda:7"], "PyTorch sees"),
    ):
        assert command.main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("benchmarks: ")
        assert words in said


def test_the_list_names_every_workload(capsys):
    assert command.main(["--list", "--op", "modal_pool"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == sum(entry.workload.op == "modal_pool" for entry in suites.CPU.entries)
    assert "modal_pool 1024x3x768 float32  against eager, compile" in said


@pytest.mark.rest
def test_a_suite_measures_what_fits_its_time_and_names_the_rest(tmp_path):
    small = tuple(suites.Entry(Workload("distill_loss", {"rows": 8, "classes": c}), ("eager", "fla")) for c in (10, 20))
    suite = replace(suites.QUICK, entries=small, seconds=0.01, minutes=60.0)
    found = run.run_suite(suite, small, torch.device("cpu"), quiet=True)
    assert [r["workload"]["sizes"]["classes"] for r in found["results"]] == [10, 20]
    assert found["missing"]["fla"]
    assert found["ceilings"]["stream_gb_s"] > 0
    assert found["machine"]["cpu"]
    assert re.fullmatch(r"[a-z0-9-]+-\d{4}-\d\d-\d\d-[0-9a-z.-]+", machine.slug(found["machine"]))
    results.save(found, tmp_path / "found.json")
    assert results.load(tmp_path / "found.json") == found
    lines = (tmp_path / "found.json").read_text().splitlines()
    assert sum(line.startswith('{"workload": ') for line in lines) == 2
    spent = run.run_suite(suite, small, torch.device("cpu"), minutes=0.0, quiet=True)
    assert spent["results"] == []
    assert [left["reason"] for left in spent["left_out"]] == ["the suite's time was spent"] * 2


@pytest.mark.rest
def test_what_a_call_had_no_time_for_is_measured_by_the_next_one(tmp_path, capsys, monkeypatch):
    """With --resume, and without rich."""
    small = tuple(suites.Entry(Workload("distill_loss", {"rows": 8, "classes": c}), ("eager",)) for c in (10, 20))
    suite = replace(suites.QUICK, entries=small[:1], seconds=0.01, minutes=60.0)
    file = tmp_path / "found.json"
    results.save(run.run_suite(suite, small[:1], torch.device("cpu"), quiet=True), file)
    kept = results.load(file)
    kept["left_out"] = [{"name": small[1].workload.name, "reason": run.LATE}]
    results.save(kept, file)
    monkeypatch.setitem(suites.SUITES, "cpu", replace(suite, entries=small))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rich" else find_spec(name, *a))
    assert command.main(["--json", str(file), "--resume"]) == 0
    found = results.load(file)
    assert [r["workload"]["sizes"]["classes"] for r in found["results"]] == [10, 20]
    assert found["results"][0] == kept["results"][0]
    assert found["left_out"] == []
    assert f"{small[1].workload.name}: mfd_fast (cpu) takes" in capsys.readouterr().out
    assert command.main(["--resume"]) == 1
    assert "--json FILE needs nothing" in capsys.readouterr().err


def test_the_published_page_is_its_raw_file():
    page = command.REPORT.read_text(encoding="utf-8")
    (raw, found), *more = command.published_files()
    names = ["speed_up", "roofline", *(["scaling"] if found.get("growth") else [])]
    pictures = [command.PICTURES / f"{name}.svg" for name in names]
    assert all(path.is_file() for path in pictures)
    profiles = command.PROFILES.read_text(encoding="utf-8")
    assert page == report.render(found, raw, command.published(pictures), more, profiles)
    assert "## Where the time goes" in page


def test_another_suites_file_replaces_the_results_of_its_workloads():
    found, other = bench_samples.document(), bench_samples.document()
    other["suite"], other["results"], other["left_out"] = "heads", other["results"][1:2], []
    other["results"][0]["measurements"][2]["median"] = 5.0
    text = report.render(found, "raw.json", [], [("more.json", other)])
    assert text.count("`mfd_loss 256x3x512x100 float32` | reference | torch.compile | 6 ms | 5 ms") == 1
    assert "torch.compile | 6 ms | 3 ms" not in text
    assert "| `mfd_loss` 256x3x512x100 | [more.json](more.json) |" in text
    assert "`python -m benchmarks --suite heads --publish`" in text
    found["results"][1]["workload"] |= {"name": "mfd_loss 7x7", "sizes": {"rows": 7, "classes": 7}}
    assert "`mfd_loss 7x7" not in report.render(found, "raw.json", [], [("more.json", other)])


def test_another_instruction_sets_results_stand_beside_the_pages():
    found, other = bench_samples.document(), bench_samples.document()
    other["suite"], other["results"], other["left_out"] = "heads", other["results"][1:2], []
    other["machine"] |= {"isa": "avx2", "environment": {"MFD_FAST_CPU_ISA": "avx2", "MKL_CACHE": "a path"}}
    text = report.render(found, "raw.json", [], [("more.json", other)])
    for mark in ("", " (avx2)"):
        assert text.count(f"`mfd_loss 256x3x512x100 float32{mark}` | reference | torch.compile | 6 ms") == 1
    assert "`MFD_FAST_CPU_ISA=avx2 python -m benchmarks --suite heads --publish`" in text
    assert command.results_name(other).endswith("-heads-avx2")


def test_the_op_inside_a_compiled_function_has_a_table():
    found = bench_samples.document()
    slow = found["results"][1]
    assert "Inside torch.compile" not in report.render(found, "raw.json", [])
    slow["workload"]["targets"]["inside"] = 1.0
    slow["measurements"].append(bench_samples.measured("mfd_fast:inside", "mfd_fast inside torch.compile", 4.0))
    text = report.render(found, "raw.json", [])
    assert "| `mfd_loss 256x3x512x100 float32` | 4 ms | 3 ms | 6 ms | 0.75 x | ≥ 1 |" in text
    assert (
        "| `mfd_loss 256x3x512x100 float32` | reference | inside torch.compile, x torch.compile | 0.75 | ≥ 1 |" in text
    )


def test_result_files_name_no_place_and_no_person():
    for path in command.RESULTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"/(home|root|tmp|work|Users)\b', text), path.name
        assert len(text) < 2_000_000


def test_a_target_may_be_a_rivals_speed():
    found = bench_samples.document()["results"][0]
    found["workload"]["targets"]["rivals"] = {"torchdistill": 2.5}
    assert results.targets(found)[-1].what == "x torchdistill"
    assert results.targets(found)[-1].measured == results.speed_up(found, "torchdistill")
