"""Plans launch what Triton's own launcher would: the same kernels, grids and parameters, byte by byte."""

import json
import subprocess
import sys

import pytest
import triton_launches

from mfd_fast.backends import plans

pytestmark = pytest.mark.skipif(plans.missing() is not None, reason="plans need PyTorch's C table")


def test_plans_launch_what_tritons_launcher_launches(tmp_path):
    environment = triton_launches.build(tmp_path)
    command = [sys.executable, triton_launches.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {answer["call"].split()[0].rstrip(",") for answer in answers} == {
        "distill_loss",
        "feature_loss",
        "modal_pool",
        "mfd_loss",
    }
    for answer in answers:
        assert answer["found"] == answer["expected"], answer["call"]
        assert answer["planned"] == (0 if answer["call"].endswith("that a profiler watches") else 1), answer["call"]
        assert answer["launches"] >= 3
