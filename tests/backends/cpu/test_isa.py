"""Every instruction set that this machine can run passes the battery, each in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

from mfd_fast.backends import cpu

TESTS = pathlib.Path(__file__).parents[2]
FILES = (
    "numerics/test_special_values.py",
    "numerics/test_special_fusion.py",
    "ops/test_values.py",
    "ops/test_layouts.py",
    "ops/test_poisoned_outputs.py",
    "ops/test_determinism.py",
    "ops/test_gradients.py",
)
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "--tier=quick", "-k", "cpu")
SUPPORTED = cpu.native().supported_isas()
OTHERS = [name for name in SUPPORTED if name != SUPPORTED[0]]


def test_the_best_instruction_set_is_the_default_and_baseline_is_always_there():
    assert cpu.isa() == os.environ.get("MFD_FAST_CPU_ISA", SUPPORTED[0])
    assert SUPPORTED[-1] == "baseline"


@pytest.mark.rest
@pytest.mark.parametrize("isa", OTHERS)
@pytest.mark.parametrize("file", FILES)
def test_battery_on_other_isas(isa, file):
    """The quick tier, which has every sample with every dtype: the sources are those of the default instruction set, on
    which the whole battery runs, compiled against other vectors.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, str(TESTS / file)],
        env={**os.environ, "MFD_FAST_CPU_ISA": isa},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("isa", SUPPORTED)
def test_variable_selects_the_instruction_set(isa):
    done = subprocess.run(
        [sys.executable, "-c", "from mfd_fast.backends import cpu; print(cpu.isa())"],
        env={**os.environ, "MFD_FAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == isa, done.stderr
