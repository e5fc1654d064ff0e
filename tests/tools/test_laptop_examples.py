"""The examples that need no trainer, small: they run to their end, and what they show is there."""

import importlib.util
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "audio_visual": {"seeds": 1, "epochs": 20},
    "missing_sensor": {"seeds": 2, "epochs": 10},
    "image_text": {"seeds": 1},
    "offline_teacher": {"seeds": 1, "steps": 60},
    "distributed": {"steps": 4},
}


#: tests/integrations tries them.
TRAINERS = ("multimodal_student", "open_clip_student", "transformers_vision_language", "trl_gkd")


def test_every_example_is_tried():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SMALL, *TRAINERS}


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, capsys):
    module = load(name)
    found = module.main(**SMALL[name])
    module.show(found)
    printed = capsys.readouterr().out
    assert all(word in printed for row in found for word in row.split()[:1])
    return found


@pytest.mark.rest
@pytest.mark.parametrize("name", SMALL)
def test_an_example_says_what_it_does(name):
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python examples/{name}.py --help" in done.stdout
    said = " ".join(done.stdout.split())
    assert any(word in said for word in ("is real", "are real", "random numbers")), "which data are synthetic"


@pytest.mark.rest
def test_a_student_that_lost_sensors_in_training_needs_them_less(capsys):
    found = run("audio_visual", capsys)
    assert found["teacher"]["both"][0] > 90
    assert found["plain"]["both"][0] > 70
    assert found["dropout"]["audio alone"][0] > found["plain"]["audio alone"][0]


def test_a_student_without_the_best_sensor_learns_from_a_teacher_that_has_it(capsys):
    found = run("missing_sensor", capsys)
    assert statistics.mean(found["+ teacher's logits"]) > statistics.mean(found["few labels alone"])


@pytest.mark.rest
def test_a_clip_like_student_learns_from_outputs(capsys):
    found = run("image_text", capsys)
    assert found["teacher"][0] > 80
    assert found["+ outputs"][0] > found["labels alone"][0]
    assert min(found["+ features"][0], found["+ fusion weights"][0]) > 30  # of chance 10


@pytest.mark.rest
def test_a_stored_teacher_teaches(capsys):
    found = run("offline_teacher", capsys)
    assert all(value < math.log(2000) / 1.5 for each in found.values() for value in each)
    assert found["student, stored teacher"][0] < found["student, words alone"][0] + 0.1


@pytest.mark.rest
def test_two_processes_have_the_losses_of_one(capsys):
    found = run("distributed", capsys)
    one = found.pop("one process")
    assert len(found) == 3
    for losses in found.values():
        assert losses == pytest.approx(one, rel=1e-6)
