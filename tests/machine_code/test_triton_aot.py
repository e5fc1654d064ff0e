"""Triton kernels compiled for GPUs that are not here: no spills, wide loads, shared memory and 64-bit offsets.

``MFD_FAST_AOT=complete`` compiles every kernel with every option, length, dtype and capability (`make aot`), ``each``
every kernel with every option on every capability; MFD_FAST_AOT_TRITON names a folder with the Triton that does it
(`make aot TRITON=3.6.0`).
"""

import importlib.metadata
import os
import re

import aot
import aot_distill_loss as jobs
import pytest

# Shared memory that one block may use, bytes (CUDA C++ programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

NAMES = getattr(jobs, os.environ.get("MFD_FAST_AOT", "names").upper())
TRITON = os.environ.get("MFD_FAST_AOT_TRITON")


@pytest.fixture(scope="module")
def compiler():
    with aot.Compiler(TRITON) as found:
        yield found


def test_the_triton_that_was_asked_for_compiles(compiler):
    if TRITON is None:
        assert compiler.version() == importlib.metadata.version("triton")
    else:
        (installed,) = importlib.metadata.distributions(name="triton", path=[TRITON])
        assert compiler.version() == installed.version


def assert_offsets_are_64_bit(ttir):
    """Row numbers and row offsets never pass through 32 bits."""
    program = re.search(r"(%\S+) = tt.get_program_id x : i32", ttir)
    assert re.search(rf"arith.extsi {re.escape(program[1])} : i32 to i64", ttir)
    assert not re.search(rf"arith.muli {re.escape(program[1])}\b", ttir)


@pytest.mark.rest
@pytest.mark.parametrize("name", NAMES)
def test_machine_code_of_rows(compiler, name):
    report = compiler.report("aot_distill_loss", name)
    kernel, classes, dtype, capability, _ = name.split("-")
    assert report.stack == 0
    assert report.local_instructions == 0
    assert report.shared <= SHARED_LIMIT[int(capability)]
    if kernel != "reduce_loss":  # one program
        assert_offsets_are_64_bit(report.ttir)
    if kernel in jobs.KERNELS:
        # Rows of 100 bfloat16 are aligned to 8 bytes, all others here to 16.
        width = "64" if (classes, dtype) == ("100", "bf16") else "128"
        assert report.load_widths.get(width, 0) >= 2
        if kernel != "distill_rows":
            assert report.store_widths.get(width, 0) >= 1
        assert "16" not in report.store_widths or jobs.is_plain(name)
    if kernel == "scale_in_place":
        assert report.load_widths.get("128", 0) >= 1
        assert report.store_widths.get("128", 0) >= 1
    if kernel in jobs.SPARSE_KERNELS:  # beside the gather of the listed classes
        assert report.load_widths.get("128", 0) >= 1


KEYED = [f"{kernel}-1000-bf16-90-{option}" for kernel in jobs.KERNELS for option in ("forward", *jobs.OTHER_NUMBERS)]
KEYED += [f"{kernel}-1000-bf16-90-bucket" for kernel in jobs.SPARSE_KERNELS]


@pytest.mark.parametrize("name", KEYED)
def test_numbers_of_rows_are_run_time_values(compiler, name):
    """Other temperatures, parameters, smoothing, row counts and strides of the same alignment compile nothing new.

    Nor do labels, masks and weights that begin anywhere.
    """
    first, *others = compiler.keys("aot_distill_loss", name)
    assert len(others) == 6
    assert all(other == first for other in others)


@pytest.mark.parametrize("option", [*jobs.OPTIONS, *jobs.SPARSE, *jobs.PARTS, *jobs.SPARSE_PARTS])
@pytest.mark.parametrize("classes", [1000, 128256])
def test_loss_and_gradient_are_one_launch_on_triton(option, classes):
    """Beside the counting of the rows and the sum of the programs' partial losses."""
    name = f"distill_scalar-{classes}-bf16-90-{option}"
    sparse = option in jobs.SPARSE or option in jobs.SPARSE_PARTS
    kernel = "topk_scalar" if sparse else "plain_scalar" if jobs.is_plain(name) else "distill_scalar"
    assert jobs.launched(name) == ["count_rows", kernel, "reduce_loss"]
