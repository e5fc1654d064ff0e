"""The quick tier finds a fault of each kind, planted in one backend after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import seeded_fault

ROOT = Path(__file__).resolve().parents[2]
#: Where each kind should be found: a part of the quick tier, so that five runs stay short.
PARTS = {
    "dropped temperature": "tests/ops/test_values.py",
    "missing mask": "tests/ops/test_values.py",
    "off-by-one tail": "tests/ops/test_values.py",
    "wrong stride": "tests/ops/test_layouts.py",
    "lost NaN": "tests/numerics/test_special_values.py",
}


def test_there_is_one_fault_of_each_kind_and_all_backends():
    assert seeded_fault.FAULTS.keys() == PARTS.keys()
    assert {backend for backend, _ in seeded_fault.FAULTS.values()} == {"reference", "cpu", "triton", "cuda"}


@pytest.mark.rest
@pytest.mark.parametrize("name", seeded_fault.FAULTS)
def test_the_quick_tier_finds_a_seeded_fault(name):
    backend, _ = seeded_fault.FAULTS[name]
    options = ("--tier=quick", "-x", "-q", "-p", "seeded_fault", "-p", "no:cacheprovider", "-k", backend)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, PARTS[name]],
        cwd=ROOT,
        env={**os.environ, "MFD_FAST_SEEDED_FAULT": name, "PYTHONPATH": str(ROOT / "tests" / "support")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout[-3000:]
    found = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    assert found is not None
    assert backend in found[1], found[1]
