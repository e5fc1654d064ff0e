"""Class-sharded heads on two and four gloo processes give what one process gives."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mfd_fast as mfd
from mfd_fast.problems import linear

ROWS, CLASSES = 9, 23
CASES = {
    "forward_kl": {"temperature": 2.0},
    "reverse_kl": {"divergence": "reverse_kl", "hard_weight": 0.3, "label_smoothing": 0.1},
    "jsd": {
        "divergence": mfd.JSD(0.3),
        "temperature": torch.linspace(1, 3, ROWS),
        "hard_weight": 1.0,
        "student_transform": mfd.LogitTransform(scale=0.7, softcap=3.0),
        "weight": torch.linspace(0.5, 1.5, ROWS),
    },
    "hard_alone": {"soft_weight": 0.0, "hard_weight": 1.0, "reduction": "sum"},
    "per_row": {"reduction": "none", "scale_by_temperature": False, "teacher_temperature": 1.5},
}


def _heads():
    rng = torch.Generator().manual_seed(0)
    student = [
        torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((ROWS, 6), (CLASSES, 6), (CLASSES,))
    ]
    teacher = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((ROWS, 8), (CLASSES, 8))]
    labels = torch.randint(CLASSES, (ROWS,), generator=rng)
    labels[2] = -100
    return student, teacher, labels


def _options(options):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def _loss(student, teacher, labels, **options):
    hidden, weight, bias = leaves = [t.clone().requires_grad_() for t in student]
    out = mfd.linear_distill_loss(hidden, weight, *teacher, labels, student_bias=bias, **options)
    out.loss.square().sum().backward()
    return out, [leaf.grad for leaf in leaves]


def _of_logits(z, t, labels, **options):
    leaf = z.clone().requires_grad_()
    loss = mfd.distill_loss(leaf, t, labels, **options)
    (gradient,) = torch.autograd.grad(loss.square().sum(), leaf)
    return loss, gradient


def _compare_logits(student, teacher, labels, own):
    """distill_loss of logits [3, 3, C], of which this rank has some columns."""
    z, t = (torch.nn.functional.linear(*side).reshape(3, 3, CLASSES) for side in (student, teacher))
    labels = labels.reshape(3, 3)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[0, 1] = False
    group = {"process_group": dist.group.WORLD}
    for name, case in CASES.items():
        options = {
            key: value.reshape(3, 3) if isinstance(value, torch.Tensor) else value
            for key, value in _options(case).items()
        }
        whole, expected = _of_logits(z, t, labels, mask=mask, **options)
        mine, found = _of_logits(z[..., own], t[..., own], labels, mask=mask, **options, **group)
        torch.testing.assert_close(mine, whole, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(found, expected[..., own], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    loss, gradient = _of_logits(z[..., own].bfloat16(), t[..., own].bfloat16(), labels, **group)
    exact, expected = _of_logits(z.bfloat16().double(), t.bfloat16().double(), labels)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected[..., own], rtol=2**-7, atol=1e-6)
    said = mfd.explain(mfd.distill_loss, z[..., own], t[..., own], **group)
    assert said.backend == "reference"
    assert "class-sharded" in said.reason
    for op in (mfd.distill_loss, lambda *sides, **options: mfd.explain(mfd.distill_loss, *sides, **options)):
        with pytest.raises(ValueError, match="distill_loss: process_group does not support dkd"):
            op(z[..., own], t[..., own], labels.clamp(min=0), divergence="dkd", **group)
    with pytest.raises(ValueError, match="only the student is differentiated"):
        mfd.distill_loss(z[..., own], t[..., own].clone().requires_grad_(), **group)
    leaf = z[..., own].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="distill_loss: class-sharded logits have no second derivatives"):
        torch.autograd.grad(mfd.distill_loss(leaf, t[..., own], **group), leaf, create_graph=True)


def _compare(rank, world, file):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timeout)
    # So few that shards of different sizes would choose different chunks.
    linear.CHUNK_BYTES, linear.MIN_CHUNK_ROWS = 270, 1
    student, teacher, labels = _heads()
    # Shards of different sizes.
    ends = [0] + [CLASSES * (r + 1) // world for r in range(world)]
    own = slice(ends[rank], ends[rank + 1])
    for name, options in CASES.items():
        whole, expected = _loss(student, teacher, labels, **_options(options))
        mine, found = _loss(
            [student[0], student[1][own], student[2][own]],
            [teacher[0], teacher[1][own]],
            labels,
            process_group=dist.group.WORLD,
            chunk_rows=4 if name == "jsd" else None,
            **_options(options),
        )
        for a, b in zip(mine, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        for a, b in zip(found, (expected[0], expected[1][own], expected[2][own]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"gradient, {n}: {m}")
    _compare_logits(student[:2], teacher, labels, own)
    with pytest.raises(ValueError, match="process_group does not support tvd"):
        mfd.linear_distill_loss(
            student[0], student[1][own], teacher[0], teacher[1][own], divergence="tvd", process_group=dist.group.WORLD
        )
    with pytest.raises(ValueError, match="only the student is differentiated"):
        mfd.linear_distill_loss(
            student[0],
            student[1][own],
            teacher[0].clone().requires_grad_(),
            teacher[1][own],
            process_group=dist.group.WORLD,
        )
    with pytest.raises(ValueError, match="process_group does not support classes of a transform"):
        mfd.linear_distill_loss(
            student[0],
            student[1][own],
            teacher[0],
            teacher[1][own],
            student_transform=mfd.LogitTransform(classes=3),
            teacher_transform=mfd.LogitTransform(classes=3),
            process_group=dist.group.WORLD,
        )
    hidden = student[0].clone().requires_grad_()
    out = mfd.linear_distill_loss(hidden, student[1][own], teacher[0], teacher[1][own], process_group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="class-sharded logits have no second derivatives"):
        torch.autograd.grad(out.loss, hidden, create_graph=True)
    # Plain PyTorch all the way, and logits far from zero.
    moved = [t.float().requires_grad_() for t in (student[0], student[1][own], student[2][own] + 1e4)]
    out = mfd.linear_distill_loss(
        *moved[:2],
        *(t.float() for t in (teacher[0], teacher[1][own])),
        labels,
        student_bias=moved[2],
        hard_weight=1.0,
        process_group=dist.group.WORLD,
        backend="reference",
    )
    out.loss.backward()
    exact = mfd.linear_distill_loss(
        *(t.float().double() for t in student[:2]),
        *(t.float().double() for t in teacher),
        labels,
        student_bias=(student[2] + 1e4).float().double(),
        hard_weight=1.0,
    )
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-3, atol=0)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_shards_give_the_numbers_of_the_whole(world, tmp_path):
    mp.spawn(_compare, (world, tmp_path / "rendezvous"), nprocs=world)
