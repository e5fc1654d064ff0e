"""The trainers' tests run where their packages are. Without one there is nothing to collect, but for `make trainers`,
which sets MFD_FAST_TRAINERS: there it is an error."""

import importlib.util
import os
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

missing = {
    name: absent
    for name, packages in PACKAGES.items()
    if (absent := [package for package in packages if importlib.util.find_spec(package) is None])
}
if missing and os.environ.get("MFD_FAST_TRAINERS"):
    raise pytest.UsageError(f"make trainers: not installed: {', '.join(sorted(set().union(*missing.values())))}")
collect_ignore = [f"test_{name}.py" for name in missing]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test from one seed, two threads, in a folder of its own, without a network."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_DISABLED"):
        monkeypatch.setenv(name, "1")
