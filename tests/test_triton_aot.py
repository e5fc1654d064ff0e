"""Triton kernels compiled for GPUs that are not here: no spills, wide loads, shared memory and 64-bit offsets."""

import re

import aot
import aot_distill_loss as jobs
import pytest

# Shared memory that one block may use, bytes (CUDA C++ programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_FILE = 65536

NAMES = [*jobs.NAMES, *jobs.EXTRA]


@pytest.fixture(scope="module")
def reports():
    return aot.compile_all("aot_distill_loss", NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_machine_code(reports, name):
    report = reports[name]
    kernel, classes, dtype, capability = name.split("-")
    assert report.stack == 0
    assert report.local_instructions == 0
    assert report.shared <= SHARED_LIMIT[int(capability)]
    if kernel in jobs.KERNELS:
        # Rows of 100 bfloat16 are aligned to 8 bytes, all others here to 16.
        width = "64" if (classes, dtype) == ("100", "bf16") else "128"
        assert report.load_widths.get(width, 0) >= 2
        if kernel != "distill_rows":
            assert report.store_widths.get(width, 0) >= 1
        assert "16" not in report.store_widths


@pytest.mark.parametrize("name", NAMES)
def test_offsets_are_64_bit(reports, name):
    """Row numbers and row offsets never pass through 32 bits."""
    ttir = reports[name].ttir
    kernel = name.split("-")[0]
    program = re.search(r"(%\S+) = tt.get_program_id x : i32", ttir)
    if program is None:  # one program
        assert kernel == "reduce_loss"
        return
    assert re.search(rf"arith.extsi {re.escape(program[1])} : i32 to i64", ttir)
    assert not re.search(rf"arith.muli {re.escape(program[1])}\b", ttir)


@pytest.fixture(scope="module")
def keys():
    return aot.keys_of("aot_distill_loss", KEYED)


KEYED = ("distill_scalar-1000-bf16-90", "distill_rows-1000-bf16-90", "distill_rows_backward-1000-bf16-90")


@pytest.mark.parametrize("name", KEYED)
def test_numbers_are_run_time_values(keys, name):
    """Other temperatures, weights, smoothing, row counts and strides of the same alignment compile nothing new."""
    first, *others = keys[name]
    assert len(others) == 3
    assert all(other == first for other in others)
