"""The demo end to end, its statistics, and its timing gate."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

import mfd_fast as mfd
from mfd_fast import demo
from mfd_fast.backends import cuda
from mfd_fast.backends.protocol import OPS
from mfd_fast.demo import data, report, statistics, timing, train
from mfd_fast.demo.models import FusionNet
from mfd_fast.demo.train import ARMS, Config, batches, run_seed

CONDITIONS = ["all sensors", "without left half", "without right half", "without spectrum"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    threads = torch.get_num_threads()
    assert demo.main(["--quick", "--threads", "1", "--output", str(folder)]) == 0
    assert torch.get_num_threads() == threads
    return folder, json.loads((folder / "demo.json").read_text())


def test_writes_plot_and_json(quick):
    folder, found = quick
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "demo.png"]
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert found["seeds"] == [0, 1]
    assert found["machine"]["threads"] == 1
    assert found["config"]["epochs"] == 2
    assert set(found["versions"]) == {"mfd_fast", "torch", "numpy", "scikit-learn", "python"}
    assert found["parameters"]["teacher"] > 10 * found["parameters"]["student"]
    assert list(found["accuracy"]) == list(ARMS)
    for arm in found["accuracy"].values():
        assert list(arm) == CONDITIONS
        assert all(len(values) == 2 and all(0 <= v <= 1 for v in values) for values in arm.values())
    assert str(folder) not in json.dumps(found)


def test_paired_differences_follow_from_the_seeds(quick):
    _, found = quick
    assert set(found["paired"]) == {f"distilled - {arm}" for arm in ARMS if arm != "distilled"}
    for name, gains in found["paired"].items():
        for condition, gain in gains.items():
            after = found["accuracy"]["distilled"][condition]
            before = found["accuracy"][name.removeprefix("distilled - ")][condition]
            assert gain["differences"] == pytest.approx(np.subtract(after, before))
            assert gain["mean"] == pytest.approx(np.mean(gain["differences"]))


def test_every_loss_was_timed_against_eager(quick):
    for entry in quick[1]["timings"]:
        assert entry["eager_ratio"] == pytest.approx(entry["eager_ms"] / entry["mfd_fast_ms"])
        assert entry["compile_ms"] is None
        assert entry["note"] == ""


def test_equal_seeds_give_equal_results(quick):
    found = quick[1]
    done = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = run_seed(*data.load(), 1, Config(**found["config"]), lambda: done.append(1))
    finally:
        torch.set_num_threads(threads)
    assert len(done) == len(ARMS)
    assert again.accuracy == {arm: {c: found["accuracy"][arm][c][1] for c in CONDITIONS} for arm in ARMS}
    assert again.shares == {arm: {s: found["shares"][arm][s][1] for s in data.SENSORS} for arm in ARMS}
    assert all(sum(shares.values()) == pytest.approx(1) for shares in again.shares.values())


def test_a_step_of_every_arm_is_one_call_of_ours(monkeypatch):
    events, fitted = [], []

    def noted(name, function):
        return lambda *args, **options: (events.append(name), function(*args, **options))[1]

    def fit(model, lesson, steps, *rest):
        events.clear()
        fitted.append(train_fit(model, lesson, steps, *rest))
        assert events == ["mfd_loss", "step"] * steps
        return fitted[-1]

    train_fit = train.fit
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted("step", torch.optim.AdamW.step))
    for name in OPS:
        monkeypatch.setattr(mfd, name, noted(name, getattr(mfd, name)))
    run_seed(*data.load(), 0, Config(epochs=1), lambda: None)
    assert len(fitted) == len(ARMS)


@pytest.mark.parametrize("count", [2, 12, 40])
def test_paired_against_scipy(count):
    rng = np.random.default_rng(0)
    after, before = rng.normal(0.5, 1, count), rng.normal(0, 1, count)
    found = statistics.paired(list(after), list(before), 0.4)
    test = stats.ttest_rel(after, before)
    interval = test.confidence_interval()
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2, rel=1e-4)
    assert found.mean == pytest.approx((interval.high + interval.low) / 2)
    assert found.mean / found.standard_error == pytest.approx(test.statistic)
    variance = np.var(after - before, ddof=1) * (1 / count + 0.4)
    assert found.corrected_half_width == pytest.approx(stats.t.ppf(0.975, count - 1) * variance**0.5, rel=1e-4)
    wins = int((after > before).sum())
    assert found.sign_p == pytest.approx(stats.binomtest(wins, count).pvalue)


def test_student_t_points():
    for degrees in (*range(1, 60), 100, 1000, 10**6):
        assert statistics.t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=1e-4)


def test_sign_test_leaves_ties_out():
    assert statistics.sign_test([0.1] * 10) == pytest.approx(2 / 2**10)
    assert statistics.sign_test([0.1, 0.0, -0.1]) == 1.0
    assert statistics.sign_test([0.0, 0.0]) == 1.0


def test_one_seed_has_no_error_and_no_verdict():
    found = statistics.paired([0.9], [0.8], 0.4)
    assert math.isnan(found.half_width)
    assert not found.excludes_zero
    assert "cannot tell" in report.verdict([0.9], [0.8], 0.4)


@pytest.mark.parametrize(
    ("distilled", "words"),
    [
        ([0.91, 0.92, 0.93, 0.92], "Distillation helped: +12.0 points"),
        ([0.61, 0.62, 0.63, 0.62], "Distillation hurt: -18.0 points"),
        ([0.7, 0.9, 0.75, 0.86], "No difference that these seeds can show"),
    ],
)
def test_verdict_names_a_gain_only_with_its_error(distilled, words):
    sentence = report.verdict(distilled, [0.80, 0.79, 0.81, 0.80], 0.4)
    assert sentence.startswith(words)
    assert "95 % interval ±" in sentence


def test_views_are_the_halves_and_the_spectrum():
    images = np.arange(2 * 64).reshape(2, 8, 8) % 17
    left, right, spectrum = data.views(images)
    assert tuple(view.shape[1] for view in (left, right, spectrum)) == data.SIZES
    joined = np.concatenate([left.reshape(2, 8, 4), right.reshape(2, 8, 4)], axis=2)
    np.testing.assert_array_equal(joined * 16, images)
    np.testing.assert_allclose(np.expm1(spectrum[:, 0]), images.sum((1, 2)) / 16)


def test_split_is_disjoint_and_stratified():
    _, labels = data.load()
    assert len(labels) == data.IMAGES
    sets = data.stratified(labels, (100, 400, 540, 757), np.random.default_rng(3))
    rows = np.concatenate(sets)
    assert len(np.unique(rows)) == len(rows) == len(labels)
    for part in sets:
        share = np.bincount(labels[part]) / len(part)
        assert np.abs(share - 0.1).max() < 0.03


def test_batches_use_every_row_once_per_pass():
    take = batches(torch.arange(10), 5, np.random.default_rng(0))
    for _ in range(3):
        assert sorted(torch.cat([take(), take()]).tolist()) == list(range(10))


def test_wrong_gradients_are_not_timed():
    load = timing.workloads(Config(), quick=True)[-1]

    def wrong(*args, **options):
        return 1.01 * timing.eager_distill_loss(*args, **options)

    broken = timing.TimedCall(load.what, load.op, wrong, load.arguments, load.options)
    found = timing.measure(broken, "reference", seconds=0.0)
    assert found.eager_ratio is None
    assert found.note.startswith("not timed: error against float64")


def test_the_student_step_runs_the_demos_encoders():
    step = timing.workloads(Config(), quick=True)[0]
    torch.manual_seed(0)
    student = FusionNet(data.SIZES, Config().student_hidden, Config().student_width, data.CLASSES)
    features, query = step.prepare(*step.arguments)[:2]
    torch.testing.assert_close(features, student.encode(step.arguments[0]))
    assert query is step.arguments[2]


def test_relative_error_keeps_nan():
    exact = (torch.ones(2), torch.ones(2))
    assert math.isnan(timing.relative_error((torch.tensor([1.0, math.nan]), torch.ones(2)), exact))


def test_a_backend_that_can_run_nothing_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mfd_fast.backends.cuda.available", lambda: "there is no GPU")
    assert demo.main(["--quick", "--backend", "cuda", "--output", str(tmp_path)]) == 1
    assert "backend 'cuda' cannot run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_backend_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--backend", "gpu"])
    assert stop.value.code == 2
    assert "invalid choice: 'gpu'" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--quick", "--output", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("mfd-fast demo: ")


def test_missing_packages_are_named(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    hidden = {"rich", "sklearn"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else find_spec(name, *a))
    assert demo.main(["--quick"]) == 1
    assert capsys.readouterr().err == "mfd-fast demo needs rich, sklearn: pip install 'mfd-fast[demo]'\n"


def test_training_that_fails_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MFD_FAST_BACKEND", "cuda")
    monkeypatch.setattr(cuda, "available", lambda: "no GPU")
    monkeypatch.setattr(timing, "check_backend", lambda *_: None)
    assert demo.main(["--quick", "--workers", "1", "--output", str(tmp_path)]) == 1
    assert "backend 'cuda' cannot run" in capsys.readouterr().err
