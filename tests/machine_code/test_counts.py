"""What counts.json says of the kernels' machine code holds, with the compilers that it names."""

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import verdicts

from machine_code import sass
from machine_code.__main__ import compiler, kept, name_of
from machine_code.cases import CASES
from machine_code.judging import judge
from machine_code.rows import facts, measure, probed

KEPT = kept()
RECORDS = {name_of(record): record for record in KEPT["records"]}
OF_CUDA = {case.name: case for case in CASES}
HERE = Path(__file__).resolve().parent

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or sass.tools() is None, reason="nvcc and nvdisasm make and read the machine code"
)


def test_every_case_of_cuda_has_a_record():
    assert {name_of({"backend": "cuda", **case.fields()}) for case in CASES} == {
        name for name, record in RECORDS.items() if record["backend"] == "cuda"
    }


GOOD = {
    "backend": "cuda",
    "op": "distill_loss",
    "kernel": "lean",
    "divergence": "forward_kl",
    "labels": False,
    "shape": [1000],
    "dtype": "bfloat16",
    "code": "0",
    "threads": 128,
    "shared_bytes": 0,
    "cluster": 1,
    "grid_blocks": 4,
    "resident_blocks": 4,
    "instructions_per_pair": 100.0,
    "doubles_in_loops": 0,
    "narrow_in_loops": 0,
}


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, 0),
        ({"instructions_per_pair": 101.9}, 0),
        ({"instructions_per_pair": 102.1}, 1),
        ({"doubles_in_loops": 1}, 1),
        ({"narrow_in_loops": 1}, 1),
        ({"narrow_in_loops": 1, "shape": [1001]}, 0),
        ({"grid_blocks": 5}, 1),
    ],
    ids=str,
)
def test_a_fault_of_changed_code_shows(change, faults):
    found = {**GOOD, "code": "1"}
    assert len(judge(GOOD, found, lambda: {**GOOD, **change})) == faults
    if not change:
        assert judge(GOOD, GOOD, lambda: pytest.fail("the code is the same")) == []


def assert_none(faults: list[str], of: str, version: str) -> None:
    """Other compilers than those of counts.json make other code: their figures are only printed."""
    if KEPT["compilers"][of] == version:
        assert faults == []
    else:
        print(f"{version}, and counts.json is of {KEPT['compilers'][of]}:", *faults, sep="\n")


@needs_nvcc
@pytest.mark.rest
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cuda_kernels_cost_what_is_recorded(case):
    record = RECORDS[name_of({"backend": "cuda", **case.fields()})]
    found = facts(case, probed(case))
    assert_none(judge(record, found, lambda: measure(case)), "cuda", compiler())


@needs_nvcc
def test_a_record_is_what_executing_its_kernel_counts():
    case = OF_CUDA["forward_kl 112 bfloat16"]
    record = RECORDS[name_of({"backend": "cuda", **case.fields()})]
    if KEPT["compilers"]["cuda"] == compiler():
        assert json.loads(json.dumps(measure(case))) == record


@functools.cache
def _of_triton() -> dict[str, list[str]]:
    """The faults of every Triton record; a process without TRITON_INTERPRET finds them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "triton_rows.py", "--judge"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(sass.tools() is None, reason="nvdisasm reads the machine code")
@pytest.mark.rest
def test_the_triton_kernels_cost_what_is_recorded():
    """Kept for the same sources, counts and Triton."""
    version = f"triton {importlib.metadata.version('triton')}"
    trees = (verdicts.ROOT / "kernels" / "triton", verdicts.ROOT / "mfd_fast", HERE, HERE / "counts.json")
    found = verdicts.kept("counts", trees, (version,), _of_triton)
    assert set(found) == {name for name, record in RECORDS.items() if record["backend"] == "triton"}
    assert_none([fault for faults in found.values() for fault in faults], "triton", version)
