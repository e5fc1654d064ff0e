"""A step of torchtune's distillation recipe, with its own models and its own reading of a configuration: torchtune and
the torchao it needs lie in a folder of their own. Prints a line per step.

As recipes/knowledge_distillation_single_device.py takes it: the loss is instantiated from the YAML, both models give
their logits in the loss's number of chunks, labels are moved to the token before, and the loss joins the cross-entropy.
"""

from __future__ import annotations

import sys

import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules.loss import CEWithChunkedOutputLoss

VOCABULARY, RATIO = 64, 0.3
OURS = "{_component_: mfd_fast.integrations.torchtune.ChunkedKLLoss, num_output_chunks: 4}"
THEIRS = "{_component_: torchtune.modules.loss.ForwardKLWithChunkedOutputLoss, num_output_chunks: 4}"


def model(seed: int, width: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": width, "intermediate_dim": 2 * width}
    return llama3_2(vocab_size=VOCABULARY, max_seq_len=32, **sizes)


def gradients(kd_loss: str) -> list[dict[str, torch.Tensor]]:
    loss = config.instantiate(OmegaConf.create(f"kd_loss: {kd_loss}").kd_loss)
    student, teacher, hard = model(0, 16), model(1, 32), CEWithChunkedOutputLoss(loss.num_output_chunks)
    for side in (student, teacher):
        side.set_num_output_chunks(loss.num_output_chunks)
    tokens = torch.randint(VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(2))
    labels = torch.hstack([tokens[:, 1:], torch.full((3, 1), -100)])
    labels[0, :5] = -100
    optimizer, found = torch.optim.SGD(student.parameters(), lr=0.1), []
    for _ in range(3):
        logits = student(tokens)
        with torch.no_grad():
            of_teacher = teacher(tokens)
        value = (1 - RATIO) * hard(logits, labels) + RATIO * loss(logits, of_teacher, labels)
        optimizer.zero_grad()
        value.backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters()})
        optimizer.step()
    return found


def main() -> int:
    worst = 0.0
    for step, (ours, theirs) in enumerate(zip(gradients(OURS), gradients(THEIRS), strict=True)):
        largest = max(float(g.abs().max()) for g in theirs.values())
        error = max(float((ours[name] - g).abs().max()) for name, g in theirs.items()) / largest
        worst = max(worst, error)
        print(f"step {step}: {len(ours)} gradients, the worst {error:.1e} of the largest")
    return worst > 1e-6


if __name__ == "__main__":
    sys.exit(main())
