"""Class-sharded heads on two and four gloo processes give what one process gives."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mfd_fast as mfd

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


def _compare(rank, world, file):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timeout)
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
            chunk_rows=4,
            **_options(options),
        )
        for a, b in zip(mine, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        for a, b in zip(found, (expected[0], expected[1][own], expected[2][own]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"gradient, {n}: {m}")
    with pytest.raises(ValueError, match="process_group does not support tvd"):
        mfd.linear_distill_loss(
            student[0], student[1][own], teacher[0], teacher[1][own], divergence="tvd", process_group=dist.group.WORLD
        )
    with pytest.raises(ValueError, match="only the student's head is differentiated"):
        mfd.linear_distill_loss(
            student[0],
            student[1][own],
            teacher[0].clone().requires_grad_(),
            teacher[1][own],
            process_group=dist.group.WORLD,
        )
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_shards_give_the_numbers_of_the_whole(world, tmp_path):
    mp.spawn(_compare, (world, tmp_path / "rendezvous"), nprocs=world)
