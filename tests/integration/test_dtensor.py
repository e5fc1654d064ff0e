"""Distributed tensors: PyTorch computes with them, so the reference gives the value, or the argument is named."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import mfd_fast as mfd

ROWS, CLASSES, WIDTH = 6, 9, 4


def _made():
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(CLASSES, (ROWS,), generator=rng)
    labels[1] = -100
    features = [torch.randn(ROWS, WIDTH, generator=rng, dtype=torch.float64) for _ in range(2)]
    head = torch.randn(CLASSES, WIDTH, generator=rng, dtype=torch.float64)
    return student, teacher, labels, features, head


def _agree(call, tensors, places, mesh):
    """Value and gradient of the first tensor are those of whole tensors."""
    whole = [t.clone() for t in tensors]
    parts = [distribute_tensor(t, mesh, [place]) for t, place in zip(tensors, places, strict=True)]
    found = []
    for leaf, *others in (whole, parts):
        leaf.requires_grad_()
        loss = call(leaf, *others)
        loss.backward()
        found.append([t.full_tensor() if isinstance(t, DTensor) else t for t in (loss.detach(), leaf.grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _run(rank, size, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (size,))
    student, teacher, labels, features, head = _made()
    for place in (Shard(0), Replicate()):
        _agree(lambda s, t: mfd.distill_loss(s, t, temperature=2.0), (student, teacher), (place, place), mesh)
        options = {"hard_weight": 0.5, "ignored_labels": "term", "label_smoothing": 0.1}
        three = (student, teacher, labels)
        _agree(lambda s, t, y, o=options: mfd.distill_loss(s, t, y, **o), three, (place, place, place), mesh)
        _agree(lambda s, t: mfd.feature_loss(s, t), (features[0], features[1]), (place, place), mesh)

        def fused(x, y, w, t):
            return mfd.mfd_loss([x, y], None, w, None, t).loss

        _agree(fused, (*features, head, teacher), (place, place, Replicate(), place), mesh)

    def split(t):
        return distribute_tensor(t, mesh, [Replicate()])

    with pytest.raises(mfd.BackendError, match="student is a DTensor, which has no memory that a kernel could read"):
        mfd.distill_loss(split(student), split(teacher), backend="cpu")
    for name, call in {
        "student": lambda: mfd.distill_loss(split(student), teacher),
        "teacher": lambda: mfd.distill_loss(student, split(teacher)),
        "labels": lambda: mfd.distill_loss(student, teacher, split(labels), hard_weight=1.0),
        "weight": lambda: mfd.distill_loss(student, teacher, weight=split(student[:, 0])),
        "temperature": lambda: mfd.distill_loss(student, teacher, temperature=split(torch.tensor(2.0))),
        r"teacher\[0\]": lambda: mfd.feature_loss(features[0], split(features[1])),
        "head_weight": lambda: mfd.mfd_loss(features, None, split(head), None, teacher),
        r"features\[0\]": lambda: mfd.modal_pool([split(x) for x in features], head[0]),
    }.items():
        with pytest.raises(TypeError, match=f"{name} must be a tensor that PyTorch can compute with, got DTensor"):
            call()
    dist.destroy_process_group()


def test_distributed_tensors_give_the_value_or_are_named(tmp_path):
    mp.spawn(_run, args=(2, tmp_path / "store"), nprocs=2)
