"""OpenCLIP: a small CLIP learns the similarities of a larger one.

    python examples/open_clip_student.py

Models are made from configurations and data are random: nothing is downloaded.
"""

from __future__ import annotations

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from mfd_fast.integrations.open_clip import DistillClipLoss


def clip(width: int) -> CLIP:
    vision = CLIPVisionCfg(layers=1, width=width, head_width=8, patch_size=8, image_size=16)
    text = CLIPTextCfg(context_length=8, vocab_size=40, width=width, heads=2, layers=1)
    return CLIP(16, vision, text, output_dict=True)


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    student, teacher = clip(16), clip(32)
    images, texts = torch.randn(32, 3, 16, 16), torch.randint(1, 40, (32, 8))
    criterion = DistillClipLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        with torch.no_grad():
            dist = {f"dist_{name}": value for name, value in teacher(images, texts).items()}
        terms = criterion(**student(images, texts), **dist, output_dict=True)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
