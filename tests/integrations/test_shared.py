"""Labels, vocabularies, versions and hooks: what needs no trainer."""

import importlib.metadata
import importlib.util
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import mfd_fast as mfd
from mfd_fast.integrations import align_vocabulary, shared, shift_labels


def test_importing_the_package_imports_no_trainer():
    trainers = {"transformers", "trl", "modelopt", "torchdistill", "timm", "sentence_transformers", "lightning"}
    code = (
        f"import sys, mfd_fast, mfd_fast.integrations; print({trainers | {'open_clip', 'kernels'}} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_shifted_labels_give_the_gradient_of_shifted_logits():
    student = torch.randn(3, 7, 11, requires_grad=True)
    teacher, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, :4] = labels[1] = -100
    options = {"hard_weight": 0.5, "temperature": 2.0}
    cut = mfd.distill_loss(student[:, :-1], teacher[:, :-1], labels[:, 1:], **options)
    whole = mfd.distill_loss(student, teacher, shift_labels(labels), **options)
    assert torch.equal(cut, whole)
    expected, found = torch.autograd.grad(cut, student)[0], torch.autograd.grad(whole, student)[0]
    assert torch.equal(found, expected)


def test_shift_labels():
    labels = torch.arange(6, dtype=torch.int32).view(2, 3)
    assert shift_labels(labels, ignore_index=-1).tolist() == [[1, 2, -1], [4, 5, -1]]
    assert labels.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert shift_labels(labels).dtype == torch.int32
    assert shift_labels(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0)
    for wrong in (torch.randn(2, 3), torch.tensor(3), [1, 2]):
        with pytest.raises(TypeError, match="shift_labels: labels must be an integer tensor"):
            shift_labels(wrong)


@pytest.mark.parametrize(("student", "teacher"), [(9, 12), (12, 9), (9, 9)])
def test_aligned_vocabularies(student, teacher):
    x, y = torch.randn(4, student, requires_grad=True), torch.randn(4, teacher)
    sides = align_vocabulary(student, teacher)
    loss = mfd.distill_loss(x, y, student_transform=sides[0], teacher_transform=sides[1])
    expected = mfd.distill_loss(x[:, :9], y[:, :9])
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, x)
    assert not gradient[:, 9:].any()


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, None])
def test_align_vocabulary_refuses(wrong):
    with pytest.raises(ValueError, match="align_vocabulary: teacher_classes must be an integer >= 1"):
        align_vocabulary(3, wrong)


@pytest.mark.parametrize(
    ("found", "fits"),
    [("1.16.0", True), ("1.16", True), ("1.17.3rc1", True), ("1.16.0+cpu", True), ("1.15.9", False), ("2.0.0", False)],
)
def test_versions(monkeypatch, found, fits):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: found)
    if fits:
        shared.require("trl", "1.16", "2")
    else:
        with pytest.raises(ImportError, match=f"found trl {found}, needed is trl>=1.16,<2"):
            shared.require("trl", "1.16", "2")


def test_a_missing_package():
    with pytest.raises(ImportError, match=r"no-such-trainer is not installed, needed is no-such-trainer>=1,<2"):
        shared.require("no-such-trainer", "1", "2")


#: Each adapter's package.
ADAPTERS = {
    "autogluon": "autogluon.multimodal",
    "kernels": "kernels",
    "lightning": "lightning",
    "modelopt": "nvidia-modelopt",
    "open_clip": "open_clip_torch",
    "sentence_transformers": "sentence-transformers",
    "timm": "timm",
    "torchdistill": "torchdistill",
    "torchtune": "torchtune",
    "transformers": "transformers",
    "trl": "trl",
}


@pytest.mark.parametrize("found", ["0.0.1", "99.1"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_of_another_version(monkeypatch, adapter, found):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: found)
    monkeypatch.delitem(sys.modules, f"mfd_fast.integrations.{adapter}", raising=False)
    package = re.escape(ADAPTERS[adapter])
    with pytest.raises(ImportError, match=rf"found {package} {re.escape(found)}, needed is {package}>=[\d.]+,<[\d.]+$"):
        importlib.import_module(f"mfd_fast.integrations.{adapter}")


def test_no_adapter_is_left_out():
    files = {path.stem for path in Path(shared.__file__).parent.glob("*.py")}
    assert files - set(ADAPTERS) == {"__init__", "shared", "layers", "fusion"}  # these need no package


@pytest.mark.parametrize("required", [True, False])
def test_a_missing_trainer(monkeypatch, required):
    """Its file is left out; `make trainers` leaves none out."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else name)
    monkeypatch.setenv("MFD_FAST_TRAINERS", "1" if required else "")
    conftest = Path(__file__).with_name("conftest.py")
    if required:
        with pytest.raises(pytest.UsageError, match="make trainers: not installed: timm"):
            runpy.run_path(conftest)
    else:
        assert runpy.run_path(conftest)["collect_ignore"] == ["test_timm.py"]


def test_signatures():
    def hook(self, model, *args, inputs=None, **kwargs):
        return None

    shared.check_signature(hook, "self, model, *args, inputs, **kwargs")
    for changed in (
        "self, model, *args, inputs",
        "self, inputs, *args, model, **kwargs",
        "self, model, args, inputs, kwargs",
    ):
        with pytest.raises(ImportError, match=r"hook takes \(self, model, \*args, inputs, \*\*kwargs\)"):
            shared.check_signature(hook, changed)


def test_what_is_replaced_comes_back():
    class Trainer:
        @staticmethod
        def loss():
            return "its own"

    module = types.SimpleNamespace(loss="its own")
    targets = ((Trainer, "loss", staticmethod(lambda: "ours")), (module, "loss", "ours"))
    before = vars(Trainer)["loss"]
    with shared.replaced("test", *targets):
        assert Trainer.loss() == Trainer().loss() == module.loss == "ours"
        with pytest.raises(RuntimeError, match="does not nest"), shared.replaced("test", *targets):
            pass
        assert module.loss == "ours"
    assert vars(Trainer)["loss"] is before
    assert module.loss == "its own"
    with pytest.raises(KeyError), shared.replaced("test", *targets):
        raise KeyError
    assert vars(Trainer)["loss"] is before
    assert module.loss == "its own"
    with pytest.raises(KeyError, match="renamed"), shared.replaced("test", targets[0], (module, "renamed", 1)):
        pass
    assert vars(Trainer)["loss"] is before
    with shared.replaced("test", *targets):  # nothing is left active
        assert module.loss == "ours"


def test_counts_become_normalizers():
    assert shared.item_count(None) is None
    assert shared.item_count(7) == 7
    for count in (torch.tensor(7), torch.tensor([7, 7]), torch.tensor(7.0)):
        value = shared.item_count(count)
        assert value.is_floating_point()
        assert value.dim() == 0
        assert value == 7
    assert shared.item_count(torch.tensor(2**24 + 1.0, dtype=torch.float64)).dtype == torch.float64
