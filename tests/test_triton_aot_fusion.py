"""The fusion kernels compiled for GPUs that are not here, and how many launches a call makes."""

import re

import aot
import aot_feature_loss
import aot_mfd_loss
import aot_modal_pool
import pytest
import torch
from aot_recorder import launched
from op_db import RECORDS
from test_triton_aot import SHARED_LIMIT

MODULES = {m.__name__: m for m in (aot_modal_pool, aot_mfd_loss, aot_feature_loss)}
CASES = [(module, name) for module, jobs in MODULES.items() for name in jobs.NAMES]
# Loads of 16 bytes: rows of x, upstream and z; those of the second stage are column sums.
NARROW = ("reduce_columns", "scale_all_in_place")


@pytest.fixture(scope="module")
def reports():
    return {name: aot.compile_all(name, list(jobs.NAMES)) for name, jobs in MODULES.items()}


@pytest.mark.parametrize(("module", "name"), CASES, ids=[name for _, name in CASES])
def test_machine_code(reports, module, name):
    report = reports[module][name]
    kernel, shape, dtype, capability = name.split("-")
    assert report.stack == 0
    assert report.local_instructions == 0
    assert report.shared <= SHARED_LIMIT[int(capability)]
    if kernel not in NARROW:
        # 16 modalities fill the registers with one row of 256 float32 per block: two of them per thread.
        width = "64" if shape == "16x256" else "128"
        assert report.load_widths.get(width, 0) >= 2
        assert report.store_widths.get(width, 0) >= 1
        assert "16" not in report.store_widths
    # float32 keeps float32 accuracy: no product of its is left to the tensor cores.
    wanted = kernel == "mfd_single_pass" and dtype == "bf16"
    assert (report.tensor_core_instructions > 0) == wanted


@pytest.mark.parametrize(("module", "name"), CASES, ids=[name for _, name in CASES])
def test_offsets_are_64_bit(reports, module, name):
    """Row numbers never pass through 32 bits; the second stage has fewer programs than columns."""
    ttir = reports[module][name].ttir
    if name.startswith("reduce_columns"):
        return
    program = re.search(r"(%\S+) = tt.get_program_id x : i32", ttir)
    assert re.search(rf"arith.extsi {re.escape(program[1])} : i32 to i64", ttir)
    assert not re.search(rf"arith.muli {re.escape(program[1])}\b", ttir)


KEYED = {
    "aot_modal_pool": "pool_backward-4x1024-bf16-90",
    "aot_mfd_loss": "mfd_single_pass-3x768x1000-bf16-90",
    "aot_feature_loss": "match_taps-mse-bf16-90",
}


@pytest.mark.parametrize("module", KEYED)
def test_numbers_are_run_time_values(module):
    """Other temperatures, weights and row counts compile nothing new."""
    first, *others = aot.keys_of(module, (KEYED[module],))[KEYED[module]]
    assert len(others) == 3
    assert all(other == first for other in others)


def launches_of(op, name, wrt, **changes):
    record = RECORDS[op]
    arguments = {**record.samples()[name], **changes}
    for key in wrt:
        value = arguments[key]
        for t in value if isinstance(value, list) else [value]:
            t.requires_grad_()
    with launched() as forward:
        out = record.op(**arguments, backend="triton")
    loss = out if isinstance(out, torch.Tensor) else out[0].sum()
    with launched() as backward:
        loss.backward()
    return forward, backward


def test_launches_of_modal_pool():
    forward, backward = launches_of("modal_pool", "everything", ("features", "query", "bias", "temperature"))
    assert (forward, backward) == (["pool_forward"], ["pool_backward", "reduce_columns"])
    forward, backward = launches_of("modal_pool", "query", ("features",))
    assert (forward, backward) == (["pool_forward"], ["pool_backward"])


def test_launches_of_feature_loss():
    """All taps in one launch, and one to add up the programs; backward multiplies by the upstream gradient."""
    forward, backward = launches_of("feature_loss", "taps", ("student",))
    assert forward == ["match_taps", "reduce_columns"]
    assert backward == ["scale_all_in_place"]


def test_launches_of_mfd_loss():
    """One launch for the loss and all row gradients, and one to add up the programs in a fixed order."""
    wrt = ("features", "query", "bias", "head_weight", "head_bias")
    forward, backward = launches_of("mfd_loss", "everything", wrt)
    assert forward == ["mfd_single_pass", "reduce_columns"]
    assert backward == ["scale_all_in_place"]


def test_shapes_alone_choose_between_the_single_pass_and_the_chain(monkeypatch):
    wrt = ("features", "query", "head_weight")
    from mfd_fast.backends.triton import mfd_loss

    monkeypatch.setattr(mfd_loss, "MAX_CLASSES", 10)
    forward, backward = launches_of("mfd_loss", "plain", wrt)
    assert "mfd_single_pass" not in forward
    assert forward[0] == "pool_forward"
    assert backward[-2:] == ["pool_backward", "reduce_columns"]
