"""What counts.json says of the kernels' machine code holds, with the compilers that it names."""

import json
import shutil

import pytest

from machine_code import sass
from machine_code.__main__ import compiler, kept, name_of
from machine_code.cases import CASES
from machine_code.judging import judge
from machine_code.rows import facts, measure, probed

KEPT = kept()
RECORDS = {name_of(record): record for record in KEPT["records"]}

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or sass.tools() is None, reason="nvcc and nvdisasm make and read the machine code"
)


OF_CUDA = {name_of({"backend": "cuda", **case.fields()}): case for case in CASES}
#: Counted since records say which code they are of.
COUNTED = [(OF_CUDA[name], record) for name, record in RECORDS.items() if name in OF_CUDA and "code" in record]


def test_every_record_of_cuda_is_of_a_case():
    assert {name for name, record in RECORDS.items() if record["backend"] == "cuda"} <= OF_CUDA.keys()
    assert COUNTED


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
@pytest.mark.parametrize(("case", "record"), COUNTED, ids=[case.name for case, _ in COUNTED])
def test_the_cuda_kernels_cost_what_is_recorded(case, record):
    assert_none(judge(record, facts(case, probed(case)), lambda: measure(case)), "cuda", compiler())


@needs_nvcc
@pytest.mark.rest
def test_a_record_is_what_executing_its_kernel_counts():
    case, record = COUNTED[0]
    if KEPT["compilers"]["cuda"] == compiler():
        found = json.loads(json.dumps(measure(case)))
        # Which lines of 512 bytes the rows share depends on where they lie.
        assert found.pop("simulated") == pytest.approx(record["simulated"], rel=0.05)
        assert found == {key: value for key, value in record.items() if key != "simulated"}
