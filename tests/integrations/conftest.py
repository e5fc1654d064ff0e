"""The trainers' tests run where their packages are: `make trainers`. Without one there is nothing to collect."""

import importlib.util
from pathlib import Path

import pytest
import torch

#: What a file's trainer cannot do without; the others need no package.
PACKAGES = {
    "transformers": ("transformers", "accelerate"),
    "trl": ("trl", "peft"),
    "modelopt": ("modelopt",),
    "torchdistill": ("torchdistill",),
    "timm": ("timm",),
    "sentence_transformers": ("sentence_transformers",),
    "lightning": ("lightning",),
    "autogluon": ("lightning", "autogluon"),
    "torchtune": ("torchtune", "omegaconf"),
    "open_clip": ("open_clip",),
    "kernels": ("kernels", "modelopt"),
    "examples": ("transformers", "trl", "open_clip"),
}

collect_ignore = [
    f"test_{name}.py"
    for name, packages in PACKAGES.items()
    if any(importlib.util.find_spec(package) is None for package in packages)
]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test from one seed, two threads, in a folder of its own, without a network."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_DISABLED"):
        monkeypatch.setenv(name, "1")
