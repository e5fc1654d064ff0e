"""Sample calls of linear_distill_loss: heads of both sides, and teachers that are given as logits."""

from __future__ import annotations

import torch
from harness import Arguments

import mfd_fast as mfd
from mfd_fast.testing import distill_inputs

HEADS = (
    "student_hidden",
    "student_weight",
    "student_bias",
    "teacher_hidden",
    "teacher_weight",
    "teacher_bias",
)


def samples(
    dtype: torch.dtype = torch.float32, distance: str = "far", seed: int = 0, rows: int = 6, classes: int = 11
) -> dict[str, Arguments]:
    """``distance`` "near": the teacher's head is the student's, moved by a little."""
    rng = torch.Generator().manual_seed(500 + seed)

    def draw(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (spread * torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype)

    base = distill_inputs((rows, classes), distance=distance, dtype=dtype, seed=seed)
    width = 5
    head = {
        "student_hidden": draw(rows, width),
        "student_weight": draw(classes, width),
        "student_bias": draw(classes, spread=0.3),
    }
    if distance == "far":
        teacher = {"teacher_hidden": draw(rows, 7), "teacher_weight": draw(classes, 7, spread=0.8)}
    else:
        step = 1e-2 if distance == "near" else 1e-3
        moved = {k: (v.double() + step * draw(*v.shape).double()).to(dtype) for k, v in head.items()}
        teacher = {k.replace("student", "teacher"): v for k, v in moved.items()}
    labels = base.labels.clone()
    labels[rows // 2 : rows // 2 + 1] = -100
    mask = torch.ones(rows, dtype=torch.bool)
    mask[1:2] = False
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    per_row = (0.5 + 2 * torch.rand(rows, generator=rng, dtype=torch.float64)).to(exact)
    half, used = rows // 2, max(classes - 1, 1)
    k = min(3, classes)
    indices = torch.stack([torch.randperm(classes, generator=rng)[:k] for _ in range(rows)]) if rows else None
    indices = torch.zeros(0, k, dtype=torch.int64) if indices is None else indices
    both = {**head, **teacher}
    return {
        "plain": {**both, "temperature": 2.0},
        "everything": {
            **both,
            "teacher_bias": draw(classes, spread=0.3),
            "labels": labels,
            "divergence": "jsd",
            "temperature": per_row,
            "soft_weight": 0.7,
            "hard_weight": 0.3,
            "label_smoothing": 0.1,
            "mask": mask,
            "weight": per_row.flip(0),
            "chunk_rows": 2,
        },
        "apart": {
            **both,
            "labels": labels,
            "hard_weight": 0.5,
            "ignored_labels": "term",
            "mask": mask,
            "chunk_rows": 4,
        },
        "per_row": {
            **both,
            "labels": labels,
            "divergence": mfd.DKD(1.0, 2.0),
            "temperature": torch.tensor(1.5, dtype=exact),
            "hard_weight": 0.5,
            "reduction": "none",
            "chunk_rows": 4,
        },
        "transforms": {
            **head,
            "teacher_hidden": base.teacher[:, :used],
            "teacher_weight": None,
            "student_transform": mfd.LogitTransform(scale=0.5, softcap=4.0, classes=used),
            "teacher_transform": mfd.LogitTransform(softcap=3.0),
            "divergence": "reverse_kl",
            "normalizer": torch.tensor(7.0, dtype=exact),
        },
        "leading": {
            "student_hidden": head["student_hidden"][: 2 * half].reshape(2, half, width),
            "student_weight": head["student_weight"],
            "teacher_hidden": teacher["teacher_hidden"][: 2 * half].reshape(
                2, half, teacher["teacher_hidden"].shape[-1]
            ),
            "teacher_weight": teacher["teacher_weight"],
            "temperature": 4.0,
            "teacher_temperature": 2.5,
            "scale_by_temperature": False,
            "reduction": "sum",
        },
        "topk": {
            **head,
            "teacher_hidden": mfd.TopK(base.teacher.log_softmax(-1).gather(-1, indices), indices),
            "teacher_weight": None,
            "temperature": 2.0,
        },
        "hard_only": {
            **head,
            "teacher_hidden": None,
            "teacher_weight": None,
            "labels": labels,
            "soft_weight": 0.0,
            "hard_weight": 1.0,
            "chunk_rows": 3,
        },
    }
