"""What `make gpu` makes of its journal: checks, the result file, predictions, at most 60 lines."""

import sys
from pathlib import Path

import bench_samples

from benchmarks import report as page
from mfd_fast.bench import results

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

import report
from journal import GREEN, LEFT_OUT, RED, Journal

GPU = {"gpu": "a GPU", "driver": "580", "cuda": "13.0"}
TABLE = """\
# Predictions

| something | else |
|---|--:|
| 1 | 2 |

| kernel | shape | dtype | rung | bound_us | simulated_us |
|---|---|---|---|--:|--:|
| `distill_loss` | 16384 × 32000 | bf16 | cluster | 731 | 1,240.5 |
| `distill_loss jsd` | 16384x32000 | bfloat16 | cluster | 732 | n/a |
| `distill_loss cuda labels` | 8192x1000 | bf16 | warp | 11.4 | 15 |
| `modal_pool forward` | 16384x4x1024 | bf16 | | 35 | 50 |
| `modal_pool backward` | 16384x4x1024 | bf16 | | 63 | 80 |

| kernel | shape | dtype | bound_us | simulated_us |
|---|---|---|---|---|
| `distill_loss` | 1x1 | bf16 | 1 | 1 |
"""


def workload(op, shape, dtype="bfloat16", **options):
    return {"op": op, "shape": shape, "dtype": dtype, "options": options}


def test_predictions_are_found_by_op_shape_dtype_and_options(tmp_path):
    path = tmp_path / "predictions.md"
    path.write_text(TABLE)
    rows = report.predictions(path)
    assert len(rows) == 5  # the first table that has the columns, and no other
    assert report.predicted(rows, workload("distill_loss", "16384x32000"), "cuda") == (731, 1240.5)
    assert report.predicted(rows, workload("distill_loss", "16384x32000", divergence="jsd"), "cuda") == (732, None)
    labels = workload("distill_loss", "8192x1000", hard_weight=0.5)
    assert report.predicted(rows, labels, "cuda") == (11.4, 15)
    assert report.predicted(rows, labels, "triton") == (None, None)
    assert report.predicted(rows, workload("modal_pool", "16384x4x1024"), "triton") == (98, 130)
    assert report.predicted(rows, workload("modal_pool", "16384x4x1024", "float32"), "cuda") == (None, None)
    assert report.predicted(rows, workload("distill_loss", "1x1"), "cuda") == (None, None)


def test_without_the_file_there_are_no_predictions(tmp_path):
    assert report.predictions(tmp_path / "predictions.md") == []
    assert report.predicted([], workload("distill_loss", "8x8"), "cuda") == (None, None)
    (tmp_path / "predictions.md").write_text("no table yet\n")
    assert report.predictions(tmp_path / "predictions.md") == []


def test_a_check_counts_and_says_what_is_left(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    shares = ("cuda:0/1", "triton:0/1")
    journal.plan("smoke", "cuda:0/1", 2)
    journal.end("smoke", "a", GREEN)
    journal.end("smoke", "b", LEFT_OUT, "it is refused")
    assert report.check_of(journal, "smoke", shares, 1.0, [])["verdict"] == "not finished"
    journal.plan("smoke", "triton:0/1", 1)
    found = report.check_of(journal, "smoke", shares, 1.0, [])
    assert (found["green"], found["left_out"], found["not_reached"], found["verdict"]) == (1, 1, 1, "not finished")
    journal.end("smoke", "c", GREEN)
    assert report.check_of(journal, "smoke", shares, 1.0, [])["verdict"] == "green"
    journal.end("smoke", "process triton:0/1", RED, "it died", extra=True)
    found = report.check_of(journal, "smoke", shares, 1.0, ["a note"])
    assert (found["verdict"], found["not_reached"]) == ("red", 0)
    assert found["why"] == {"process triton:0/1": "it died"}


def journal_of(tmp_path):
    """As two parts leave it: of two workloads the comparison has one, a third has raised."""
    journal = Journal(tmp_path / "j.jsonl")
    first, second, *_ = bench_samples.document()["results"]
    journal.end("facts", "machine", GREEN, result={**bench_samples.document()["machine"], **GPU})
    rates = {**bench_samples.document()["ceilings"], "gemm_dtype": "bfloat16"}
    journal.end("facts", "ceilings", GREEN, result=rates)
    for result in (first, second):
        journal.end("speed", result["workload"]["name"], GREEN, result=result)
    journal.end("compare", first["workload"]["name"], GREEN, result={**first, "flops": 7})
    journal.end("compare", "another", RED, f"RuntimeError: {tmp_path}/x.py is gone")
    return journal


def test_the_evidence_is_a_result_file_of_the_benchmarks(tmp_path):
    journal = journal_of(tmp_path)
    check = report.check_of(journal, "compare", ("all:0/1",), 3.0, [])
    found = report.evidence(journal, {"compare": check}, (str(tmp_path),))
    path = tmp_path / "results.json"
    report.save(found, path)
    loaded = results.load(path)
    assert [r["flops"] for r in loaded["results"]] == [7, 0]  # the comparison's, where there is one
    assert len(loaded["first_timings"]) == 2
    assert loaded["left_out"] == [{"name": "another", "reason": "RuntimeError: …/x.py is gone"}]
    assert loaded["checks"]["compare"]["why"] == {"another": "RuntimeError: …/x.py is gone"}
    assert str(tmp_path) not in path.read_text()
    text = page.render(loaded, "results.json", [])
    assert "| GEMM, bfloat16 |" in text


def test_the_report_has_a_table_a_reason_for_every_red_and_sixty_lines(tmp_path):
    journal = journal_of(tmp_path)
    for k in range(200):
        journal.end("battery", f"test {k}", RED, f"E  AssertionError: {k} of 9 elements\nE  more\ntests/x.py:{k}: in f")
    for k in range(100):
        journal.end("smoke", f"one {k}", RED, "wrong: " + chr(97 + k % 26) * (k + 1))
    checks = {p: report.check_of(journal, p, ("all:0/1",), 1.0, []) for p in ("smoke", "compare", "battery")}
    found = report.evidence(journal, checks, ())
    said = report.lines(found, [], "the device answers to no process")
    assert len(said) == report.MOST_LINES
    assert said[0].startswith("a GPU, torch 2.13.0")
    assert "bfloat16 GEMM 0.2 TFLOP/s" in said[1]
    assert said[2].split()[:3] == ["workload", "on", "µs"]
    row = next(line for line in said if line.startswith("distill_loss 4096x1000 float32"))
    assert row.split()[3:5] == ["cpu", "2000"]
    assert "STOPPED: the device answers to no process" in said
    reds = [line for line in said if line.startswith("RED ")]
    assert reds[0] == "RED 200 x battery: AssertionError: # of # elements  [test 0]"
    assert all(len(line) <= report.WIDTH for line in reds)
    assert said[-1].endswith("reasons more: see the journal")


def test_a_report_of_nothing_is_short(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert report.lines(report.evidence(journal, {}, ()), []) == ["unknown GPU, torch None, triton None"]
