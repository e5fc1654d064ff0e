"""Settings that must hold before torch or triton is imported: Triton kernels run interpreted and CUDA kernels
emulated, on CPU tensors; with MFD_FAST_TEST_DEVICE=cuda both run on the GPU (see on_device).
"""

import gc
import importlib.util
import os
from pathlib import Path

if os.environ.get("MFD_FAST_TEST_DEVICE") == "cuda":
    for name in ("TRITON_INTERPRET", "MFD_FAST_CUDA_EMULATOR"):
        os.environ.pop(name, None)
else:
    import cuda_emulator
    import triton_interpreter

    os.environ["TRITON_INTERPRET"] = "1"
    if "MFD_FAST_CUDA_EMULATOR" not in os.environ:
        os.environ["MFD_FAST_CUDA_EMULATOR"] = str(cuda_emulator.module())
    triton_interpreter.patch_once_a_launch()
os.environ.pop("MFD_FAST_BACKEND", None)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import on_device
import pytest
import tiers
import torch

torch.set_num_threads(2)

#: What only a GPU can show; `make gpu` rehearses it on a CPU. Without either there is nothing to collect.
collect_ignore = [] if on_device.NAME else ["gpu"]
if on_device.NAME and importlib.util.find_spec("hypothesis") is None:
    collect_ignore += [str(path) for path in Path(__file__).parent.rglob("test_hypothesis*.py")]


def pytest_addoption(parser):
    parser.addoption("--tier", choices=tiers.TIERS, default="all", help="quick and rest are together all: tiers.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "quick(*names): in the quick tier with every combination of these parameters")
    config.addinivalue_line("markers", "rest: not in the quick tier")


def pytest_collection_finish(session):
    """What was collected and imported is never garbage: a collection in a test looks at what that test left."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    tiers.keep(config, items, config.getoption("--tier"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _inputs_are_never_written():
    yield
    on_device.check_inputs()
