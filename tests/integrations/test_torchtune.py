"""torchtune's loss file, which needs torch alone, against ours.

The whole package runs in a process of its own: it needs a torchao that nothing else here may see.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_steps import agree, steps

from mfd_fast.integrations import torchtune
from mfd_fast.integrations.torchtune import ChunkedKLLoss, KLLoss

THEIRS = torchtune._its_losses()
KINDS = {
    "forward_kl": ("ForwardKLLoss", "ForwardKLWithChunkedOutputLoss", {}),
    "reverse_kl": ("ReverseKLLoss", "ReverseKLWithChunkedOutputLoss", {}),
    "symmetric_kl": ("SymmetricKLLoss", "SymmetricKLWithChunkedOutputLoss", {"sym_kd_ratio": 0.3}),
}


def token_logits():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 2, 10, 20, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 20, (2, 10), generator=generator)
    labels[0, :4] = labels[1, 9] = -100
    return student, teacher, labels


def compared(loss, chunks=None, **call):
    student, teacher, labels = token_logits()
    model = torch.nn.Module()
    model.logits = torch.nn.Parameter(student)
    values = []

    def step(_):
        if chunks:
            value = loss(list(model.logits.chunk(chunks, 1)), list(teacher.chunk(chunks, 1)), labels, **call)
        else:
            value = loss(model.logits.reshape(-1, 20), teacher.reshape(-1, 20), labels.reshape(-1), **call)
        values.append(value.item())
        return value

    return steps(model, step), values


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_torchtune_steps(divergence, normalize):
    """1e-6: theirs takes the softmax in float32."""
    name, _, options = KINDS[divergence]
    (found, values), (expected, theirs) = (
        compared(loss, normalize=normalize)
        for loss in (KLLoss(divergence, **options), getattr(THEIRS, name)(**options))
    )
    agree(found, expected)
    assert values == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_torchtune_chunked_steps(divergence, chunks):
    _, name, options = KINDS[divergence]
    ours = ChunkedKLLoss(chunks, divergence, **options)
    assert ours.num_output_chunks == chunks
    labels = token_logits()[2]
    if len(labels.chunk(chunks, 1)) != chunks:  # 8 chunks of 10 tokens are 5
        ours.num_output_chunks = chunks = len(labels.chunk(chunks, 1))
    (found, values), (expected, theirs) = (
        compared(loss, chunks) for loss in (ours, getattr(THEIRS, name)(chunks, **options))
    )
    agree(found, expected)
    assert values == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("divergence", KINDS)
def test_torchtune_with_no_label(divergence):
    student, teacher, labels = token_logits()
    student.requires_grad_()
    loss = KLLoss(divergence)(student, teacher, torch.full_like(labels, -100))
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("divergence", KINDS)
def test_torchtune_vocabularies_that_differ(divergence):
    student, teacher, labels = torch.randn(2, 4, 7), torch.randn(2, 4, 9), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="teacher must have as many classes as student, got 9 and 7"):
        KLLoss(divergence)(student, teacher, labels)
    with pytest.raises(ValueError, match="teacher must have as many classes as student, got 9 and 7"):
        ChunkedKLLoss(2, divergence)(student.chunk(2, 1), teacher.chunk(2, 1), labels)


def test_torchtune_compiled():
    """The recipes compile the loss where they compile the model."""
    student, teacher, labels = token_logits()
    loss = KLLoss()
    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher, labels), loss(student, teacher, labels))


def test_torchtune_from_yaml():
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        "kd_loss: {_component_: mfd_fast.integrations.torchtune.ChunkedKLLoss, num_output_chunks: 4}"
    )
    options = dict(config.kd_loss)
    module, name = options.pop("_component_").rsplit(".", 1)
    loss = getattr(importlib.import_module(module), name)(**options)
    assert isinstance(loss, ChunkedKLLoss)
    assert loss.num_output_chunks == 4


def test_torchtune_as_a_whole():
    """Its models, its configuration and its cross-entropy around the loss: three steps of the recipe."""
    folder = Path(sys.prefix, "torchtune")
    assert folder.is_dir(), "`make trainers` makes it"
    script = Path(__file__).with_name("torchtune_recipe.py")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("11 gradients") == 3


def test_torchtune_with_another_signature(monkeypatch):
    monkeypatch.setattr(THEIRS.ForwardKLLoss, "forward", lambda self, student, teacher: None)
    with pytest.raises(ImportError, match=r"takes \(self, student, teacher\), this adapter needs \(self, student_log"):
        torchtune._check_recipe(THEIRS)


def test_torchtune_refuses():
    with pytest.raises(ValueError, match="divergence must be one of forward_kl, reverse_kl, symmetric_kl, got 'jsd'"):
        KLLoss("jsd")
    with pytest.raises(ValueError, match=r"sym_kd_ratio must be in \[0, 1\], got 2"):
        ChunkedKLLoss(sym_kd_ratio=2)
