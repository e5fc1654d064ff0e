"""The fusion kernels compiled for GPUs that are not here, and how many launches a call makes.

``MFD_FAST_AOT=complete`` compiles mfd_loss with every divergence (`make aot`).
"""

import os

import aot
import aot_feature_loss
import aot_mfd_loss
import aot_modal_pool
import pytest
import torch
from aot_recorder import launched
from op_db import RECORDS
from test_triton_aot import SHARED_LIMIT, TRITON, assert_offsets_are_64_bit

MODULES = {m.__name__: m for m in (aot_modal_pool, aot_mfd_loss, aot_feature_loss)}
LIST = os.environ.get("MFD_FAST_AOT", "names").upper()
CASES = [(module, name) for module, jobs in MODULES.items() for name in getattr(jobs, LIST, jobs.NAMES)]
# Loads of 16 bytes: rows of x, upstream and z; those of the second stage are column sums.
NARROW = ("reduce_columns", "scale_all_in_place")


@pytest.fixture(scope="module")
def compiler():
    with aot.Compiler(TRITON) as found:
        yield found


@pytest.mark.rest
@pytest.mark.parametrize(("module", "name"), CASES, ids=[name for _, name in CASES])
def test_machine_code_of_fusion(compiler, module, name):
    report = compiler.report(module, name)
    kernel, shape, dtype, capability = name.split("-")[:4]
    assert report.stack == 0
    assert report.local_instructions == 0
    assert report.shared <= SHARED_LIMIT[int(capability)]
    if kernel != "reduce_columns":  # the second stage has fewer programs than columns
        assert_offsets_are_64_bit(report.ttir)
    if kernel == "scale_all_in_place":  # narrow in its last block alone
        assert report.load_widths.get("128", 0) >= 1
        assert report.store_widths.get("128", 0) >= 1
    if kernel not in NARROW:
        # 16 modalities fill the registers with one row of 256 float32 per block: two of them per thread.
        width = "64" if shape == "16x256" else "128"
        assert report.load_widths.get(width, 0) >= 2
        assert report.store_widths.get(width, 0) >= 1
        assert "16" not in report.store_widths
    # float32 keeps float32 accuracy: no product of its is left to the tensor cores.
    wanted = kernel == "mfd_single_pass" and dtype == "bf16"
    assert (report.tensor_core_instructions > 0) == wanted


KEYED = {
    "aot_modal_pool": "pool_backward-4x1024-bf16-90",
    "aot_mfd_loss": "mfd_single_pass-3x768x1000-bf16-90",
    "aot_feature_loss": "match_taps-mse-bf16-90",
}


@pytest.mark.parametrize("module", KEYED)
def test_numbers_of_fusion_are_run_time_values(compiler, module):
    """Other temperatures, weights and row counts compile nothing new, nor do masks and the like that begin anywhere."""
    first, *others = compiler.keys(module, KEYED[module])
    assert len(others) == 4
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
        (2 * loss).backward()  # a factor of 1 on a CPU needs no launch
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
