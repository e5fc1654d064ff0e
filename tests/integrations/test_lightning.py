"""Lightning: a teacher inside a LightningModule, in training, in checkpoints, in moves."""

import copy
import pickle

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_steps import agree, gradients

import mfd_fast as mfd
from mfd_fast.integrations.lightning import Teacher


class Net(nn.Sequential):
    def __init__(self, seed, width):
        torch.manual_seed(seed)
        super().__init__(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 3))


class Distiller(lightning.LightningModule):
    def __init__(self, wrapped=True):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(4, 3)
        self.teacher = Teacher(Net(1, 8)) if wrapped else Net(1, 8).eval().requires_grad_(False)
        self.seen = []

    def training_step(self, batch, _):
        x, y = batch
        with torch.no_grad():
            teacher = self.teacher(x)
        return mfd.distill_loss(self.student(x), teacher, y, temperature=2.0, hard_weight=0.5)

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(gradients(self.student))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, **options):
    torch.manual_seed(5)
    data = DataLoader(TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,))), batch_size=4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, **quiet, **options)
    trainer.fit(module, data)
    return trainer


def test_lightning_steps():
    wrapped, plain = Distiller(), Distiller(wrapped=False)
    before = copy.deepcopy(wrapped.teacher.model.state_dict())
    for module in (wrapped, plain):
        fit(module, enable_checkpointing=False)
    assert len(wrapped.seen) == 3
    agree(wrapped.seen, plain.seen)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.teacher.model.state_dict().items())


def test_lightning_checkpoints_hold_no_teacher(tmp_path):
    module = Distiller()
    fit(module, default_root_dir=tmp_path, enable_checkpointing=False).save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert set(saved["state_dict"]) == {"student.weight", "student.bias"}
    restored = Distiller.load_from_checkpoint(tmp_path / "last.ckpt")
    torch.testing.assert_close(restored.student.weight, module.student.weight.cpu())


def test_lightning_teacher_stays_itself():
    module = Distiller().train()
    teacher = module.teacher
    assert [name for name, _ in module.named_parameters()] == ["student.weight", "student.bias"]
    teacher.model.train()
    x = torch.randn(5, 4, requires_grad=True)
    assert torch.equal(teacher(x), teacher(x))
    assert not teacher(x).requires_grad
    assert not teacher.model.training
    module.double()
    assert teacher.model[0].weight.dtype == torch.float64
    assert teacher(x.double()).dtype == torch.float64
    module.to("meta")
    assert teacher.model[0].weight.device.type == "meta"
    clone = copy.deepcopy(Teacher(Net(1, 8)))
    assert torch.equal(pickle.loads(pickle.dumps(clone))(x), clone(x))
    assert "Net, frozen" in repr(clone)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        Teacher(lambda x: x)
