"""The scripts in examples/ that need a trainer, run as their pages say; tests/tools has the others."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name, tmp_path):
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / name)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


FALLING = ["transformers_vision_language.py", "trl_gkd.py", "open_clip_student.py"]


@pytest.mark.parametrize("name", FALLING)
def test_the_loss_of_an_example_falls(name, tmp_path):
    found = re.search(r"loss of the first step ([\d.]+), of the last ([\d.]+)", example(name, tmp_path))
    first, last = map(float, found.groups())
    assert last < first


def test_the_multimodal_example_learns(tmp_path):
    found = re.findall(r"^(.*): ([\d.]+) of the test images", example("multimodal_student.py", tmp_path), re.M)
    right = {name: float(value) for name, value in found}
    assert right["teacher"] > 0.9
    assert right["student"] > 0.8
    # Half of an image and an eighth of the width: far above the 0.1 of chance.
    assert right["student, left half alone"] > 0.5
