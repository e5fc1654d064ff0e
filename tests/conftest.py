"""Settings that must hold before torch or triton is imported: Triton kernels run interpreted and CUDA kernels
emulated, on CPU tensors.
"""

import os

import cuda_emulator

os.environ["TRITON_INTERPRET"] = "1"
os.environ["MFD_FAST_CUDA_EMULATOR"] = str(cuda_emulator.module())
os.environ.pop("MFD_FAST_BACKEND", None)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
