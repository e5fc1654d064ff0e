"""NVIDIA ModelOpt: its loss and its trainer against ours; convert, save, restore, export."""

import modelopt.torch.distill as mtd
import modelopt.torch.opt as mto
import pytest
import torch
import transformers
from modelopt.torch.distill.plugins.huggingface import KDTrainer as TheirKDTrainer
from torch import nn
from trainer_steps import VOCABULARY, agree, arguments, recorded, steps, tiny_llama, token_rows

import mfd_fast as mfd
from mfd_fast.integrations.modelopt import KDTrainer, LogitsDistillationLoss

ROWS = token_rows()
HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


class Mlp(nn.Module):
    """What ModelOpt converts must be importable to be restored."""

    def __init__(self, width=6):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 5))

    def forward(self, x):
        return self.layers(x)


def mlp(seed, width=6):
    torch.manual_seed(seed)
    return Mlp(width).double()


def converted(criterion):
    mode = [
        ("kd_loss", {"teacher_model": mlp(1, 9), "criterion": criterion, "loss_balancer": mtd.StaticLossBalancer(0.4)})
    ]
    return mtd.convert(mlp(0), mode=mode)


def kd_steps(criterion):
    model = converted(criterion)
    model.train()  # returns None
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (3, 7), generator=generator)

    def step(i):
        return model.compute_kd_loss(student_loss=nn.functional.cross_entropy(model(x[i]), y[i]))

    return steps(model, step)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_modelopt_steps(reduction, temperature):
    found = kd_steps(LogitsDistillationLoss(temperature, reduction))
    agree(found, kd_steps(mtd.LogitsDistillationLoss(temperature, reduction)))


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_modelopt_reductions_of_sequences(reduction):
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    found = LogitsDistillationLoss(2.0, reduction)(student, teacher)
    torch.testing.assert_close(found, mtd.LogitsDistillationLoss(2.0, reduction)(student, teacher))


def test_modelopt_loss_options():
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="align_vocabulary=True"):
        LogitsDistillationLoss()(student, teacher)
    for reduction in ("mean", "batchmean", "sum", "none"):
        loss = LogitsDistillationLoss(2.0, reduction, shift=True, align_vocabulary=True)
        expected = mtd.LogitsDistillationLoss(2.0, reduction)(student[:, :-1], teacher[:, :-1, :7])
        torch.testing.assert_close(loss(student, teacher), expected)
        torch.testing.assert_close(
            LogitsDistillationLoss(2.0, reduction, align_vocabulary=True)(teacher, student),
            mtd.LogitsDistillationLoss(2.0, reduction)(teacher[..., :7], student),
        )
    reverse = LogitsDistillationLoss(reduction="batchmean", divergence="reverse_kl")
    expected = mfd.distill_loss(student[0], student[1], divergence="reverse_kl")
    torch.testing.assert_close(reverse(student[0], student[1]), expected)
    with pytest.raises(ValueError, match="reduction must be one of"):
        LogitsDistillationLoss(reduction="avg")


def test_modelopt_saves_restores_and_exports(tmp_path):
    model = converted(LogitsDistillationLoss(2.0, "batchmean"))
    with torch.no_grad():
        model.layers[0].bias.fill_(0.25)
    mto.save(model, tmp_path / "kd.pt")
    restored = mto.restore(mlp(5), tmp_path / "kd.pt")
    x = torch.randn(3, 4, dtype=torch.float64)
    model.eval()
    torch.testing.assert_close(restored(x), model(x))
    exported = mtd.export(model)
    assert type(exported) is Mlp
    torch.testing.assert_close(exported(x), restored(x))
    assert exported.state_dict().keys() == mlp(0).state_dict().keys()


def trainer(kind, args=None, rows=ROWS, options=None, vocabulary=VOCABULARY):
    return kind(
        tiny_llama(0),
        transformers.TrainingArguments(**arguments(**args or {})),
        train_dataset=rows,
        eval_dataset=rows[:4],
        distill_args={"teacher_model": tiny_llama(1, vocabulary, hidden=32), "temperature": 2.0},
        **options or {},
    )


def test_modelopt_trainer_steps():
    agree(recorded(trainer(KDTrainer)), recorded(trainer(TheirKDTrainer)))
    agree(recorded(trainer(KDTrainer, options={"normalize_by_items": False})), recorded(trainer(TheirKDTrainer)))


def test_modelopt_trainer_accumulates():
    once = recorded(trainer(KDTrainer))
    agree(recorded(trainer(KDTrainer, HALVES)), once)
    # Theirs takes the mean of each of the two for divided already: twice the gradient where both have as many labels.
    even = [row | {"labels": row["input_ids"]} for row in ROWS]
    agree(recorded(trainer(KDTrainer, HALVES, even)), recorded(trainer(TheirKDTrainer, rows=even)))
    first = recorded(trainer(TheirKDTrainer, HALVES, even))[:1]
    halved = [{name: gradient / 2 for name, gradient in step.items()} for step in first]
    agree(halved, recorded(trainer(TheirKDTrainer, rows=even))[:1])
    agree(recorded(trainer(KDTrainer, HALVES, even, {"normalize_by_items": False}))[:1], first)


def test_modelopt_trainer_evaluates():
    found, expected = (trainer(kind).evaluate() for kind in (KDTrainer, TheirKDTrainer))
    for name in ("eval_loss", "eval_ce_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_modelopt_trainer_of_vocabularies_that_differ(labelled):
    rows = ROWS if labelled else [{"input_ids": row["input_ids"]} for row in ROWS]
    with pytest.raises(ValueError, match="teacher must have as many classes as student, got 71 and 64"):
        trainer(KDTrainer, rows=rows, vocabulary=VOCABULARY + 7).train()


def test_modelopt_trainer_without_labels():
    made = [trainer(kind) for kind in (KDTrainer, TheirKDTrainer)]
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in ROWS[:2]])}
    for one in made:
        one.model.train()
    found, expected = (one.compute_loss(one.model, batch) for one in made)
    torch.testing.assert_close(found.float(), expected.float())
