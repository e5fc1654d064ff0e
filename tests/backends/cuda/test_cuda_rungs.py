"""Every way in which the device's threads share rows: which one is chosen, and that all give the same numbers."""

import pytest
import torch
from draws import assert_draws_obey_rule
from harness import assert_same, evaluate, on
from op_db import RECORDS

import mfd_fast as mfd
from mfd_fast.backends import cuda
from mfd_fast.backends.cuda import distill_loss as backend
from mfd_fast.problems.rows import check_rows
from mfd_fast.testing import distill_inputs

LOSS = RECORDS["distill_loss"]
A100, H100, RTX = (80, 4, 166912), (90, 4, 232448), (120, 4, 101376)


@pytest.fixture
def emulate():
    """Sets the emulated device: capability, processors, bytes of shared memory per block."""
    yield cuda.native().set_device
    cuda.native().set_device(*H100)


def plan(classes, dtype, rows=2, teachers=1):
    logits = torch.zeros((1, classes), dtype=dtype).expand(rows, classes)
    return backend.plan(check_rows("distill_loss", logits, logits if teachers == 1 else [logits] * teachers, None))


@pytest.mark.parametrize(
    ("device", "classes", "dtype", "expected"),
    [
        (H100, 1000, torch.bfloat16, ("warp", 1)),
        (H100, 1025, torch.float32, ("block", 1)),
        (H100, 28000, torch.bfloat16, ("block", 1)),
        (H100, 32000, torch.bfloat16, ("cluster", 2)),
        (H100, 128256, torch.bfloat16, ("cluster", 8)),
        (H100, 202048, torch.float32, ("cluster", 8)),
        (H100, 10**6, torch.bfloat16, ("stream", 1)),
        (A100, 32000, torch.bfloat16, ("block", 1)),
        (A100, 128256, torch.bfloat16, ("stream", 1)),
        (RTX, 24000, torch.bfloat16, ("block", 1)),
        (RTX, 32000, torch.bfloat16, ("stream", 1)),
        (H100, 2000, torch.float64, ("stream", 1)),
    ],
    ids=str,
)
def test_shape_and_device_choose(emulate, device, classes, dtype, expected):
    emulate(*device)
    assert plan(classes, dtype)[:2] == expected


#: The longest rows that a block holds, and the shortest that it streams.
EDGES = [
    (RTX, torch.bfloat16, range(24424, 24616, 8)),
    (RTX, torch.float32, range(12208, 12312, 8)),
    (A100, torch.bfloat16, range(40816, 40976, 8)),
]


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "dkd", "nkd"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("device", "dtype", "edge"), EDGES, ids=str)
def test_rows_as_long_as_a_block_holds_run(emulate, device, dtype, edge, shift, divergence):
    """Of a kernel that asks for more memory than its plan left, the launch fails; ``shift``: unaligned rows."""
    emulate(*device)
    assert {plan(classes, dtype, rows=1)[0] for classes in edge} == {"block", "stream"}
    for classes in edge:
        drawn = distill_inputs((1, classes + shift), dtype=dtype)
        student, teacher = (side.detach()[:, shift:] for side in (drawn.student, drawn.teacher))
        losses = [
            mfd.distill_loss(student.requires_grad_(), teacher, torch.tensor([5]), divergence=divergence, backend=b)
            for b in ("cuda", "reference")
        ]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


# Small shared memory makes short rows long ones: (device, classes) and the rung.
RUNGS = {
    "warp": (H100, 130),
    "block": (H100, 1100),
    "cluster": ((90, 4, 8192), 2100),
    "stream": ((80, 4, 8192), 2100),
}
SAMPLES = ("plain", "labels", "transforms", "jsd", "alpha_beta", "dkd", "nkd", "standardize")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("name", SAMPLES)
def test_every_rung_obeys_the_rule(emulate, rung, name, dtype):
    device, classes = RUNGS[rung]
    emulate(*device)
    assert plan(classes, dtype)[0] == rung

    def arguments_of(seed):
        return LOSS.samples(dtype=dtype, rows=5, classes=classes, seed=seed)[name]

    assert_draws_obey_rule(LOSS, "cuda", arguments_of, 3, f"{rung} {name}", names=("student",))


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_has_the_by_products(emulate, rung):
    device, classes = RUNGS[rung]
    emulate(*device)
    record = RECORDS["distill_terms"]
    arguments = record.samples(rows=4, classes=classes)["labels"]
    assert_same(
        evaluate(record, on(record, "cuda"), arguments),
        evaluate(record, on(record, "reference"), arguments),
        rung,
        rtol=2e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("rung", RUNGS)
def test_rows_that_are_not_aligned_on_cuda(emulate, rung, offset):
    """Odd class counts and storage offsets: only the inside of a row can be read by 16 bytes, or nothing."""
    device, classes = RUNGS[rung]
    emulate(*device)

    def moved(seed):
        arguments = LOSS.samples(dtype=torch.bfloat16, rows=3, classes=classes + 3, seed=seed)["plain"]
        return {
            k: torch.cat([v.new_zeros(offset), v.flatten()])[offset:].view_as(v) if torch.is_tensor(v) else v
            for k, v in arguments.items()
        }

    assert_draws_obey_rule(LOSS, "cuda", moved, 3, f"{rung} {offset}", names=("student",))


@pytest.mark.parametrize("rung", RUNGS)
def test_several_teachers_on_every_rung(emulate, rung):
    """Value and every gradient; their weights differ from row to row, one of them is 0 throughout."""
    device, classes = RUNGS[rung]
    emulate(*device)
    made = [distill_inputs((3, classes), dtype=torch.float32, seed=k) for k in range(4)]
    weights = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.2, 0.0], [3.0, 1.0, 0.0]])
    leaves = [made[0].student, *(one.teacher for one in made[1:]), weights, torch.tensor([1.5, 2.0, 0.7])]
    options = {"labels": made[0].labels, "hard_weight": 0.5, "reduction": "none"}
    for divergence, standardize in (("jsd", False), ("nkd", True)):
        more = {"divergence": divergence, "teacher_transform": mfd.LogitTransform(standardize=standardize)}
        found = []
        for name, dtype in (("cuda", torch.float32), ("reference", torch.float64)):
            student, *teachers, w, t = (leaf.to(dtype).requires_grad_() for leaf in leaves)
            assert plan(classes, torch.float32, teachers=3)[0] == rung
            loss = mfd.distill_loss(
                student, teachers, teacher_weights=w, temperature=t, backend=name, **options, **more
            )
            found.append([loss, *torch.autograd.grad(loss.sum(), [student, *teachers, w, t])])
        for a, b in zip(*found, strict=True):
            near = {"rtol": 2e-4, "atol": 2e-6 * max(1.0, float(b.detach().abs().max()))}
            torch.testing.assert_close(a, b.float(), **near, msg=lambda m, d=divergence: f"{rung} {d}: {m}")


def test_rows_of_a_mixture_lie_in_device_memory_where_shared_memory_is_small(emulate):
    """Float64 rows of the backward, and a budget that no row fits."""
    emulate(80, 4, 8192)
    made = [distill_inputs((2, 600), dtype=torch.float64, seed=k) for k in range(3)]
    found = []
    for name in ("cuda", "reference"):
        leaves = [m.clone().requires_grad_() for m in (made[0].student, made[1].teacher, made[2].teacher)]
        loss = mfd.distill_loss(leaves[0], leaves[1:], temperature=2.0, reduction="none", backend=name)
        found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_teachers_beyond_the_kernels_bound():
    assert cuda.native().cuda.max_teachers == backend.MAX_TEACHERS
    logits = torch.randn(2, 5)
    many = [logits] * 33
    with pytest.raises(mfd.BackendError, match="at most 32 teachers"):
        mfd.distill_loss(logits, many, backend="cuda")
    near = {"rtol": 1e-5, "atol": 1e-6}
    other = torch.randn(2, 5)
    torch.testing.assert_close(
        mfd.distill_loss(other, many[:32], backend="cuda"), mfd.distill_loss(other, logits, backend="cuda"), **near
    )


@pytest.mark.parametrize("teacher", ["one", "several", "topk"])
def test_loss_and_gradient_are_one_launch_on_cuda(teacher):
    """So are the terms, and so are all the gradients of their backward."""
    student = torch.randn(3, 40, requires_grad=True)
    logits = torch.randn(3, 40, requires_grad=True)
    values, indices = torch.log_softmax(logits.detach(), -1).topk(5)
    of = {"one": logits, "several": [logits, logits * 2], "topk": mfd.TopK(values.requires_grad_(), indices)}[teacher]
    detached = {"one": logits.detach(), "several": [logits.detach()] * 2, "topk": mfd.TopK(values.detach(), indices)}
    labels, launches = torch.tensor([1, 2, 3]), cuda.native().launches
    before = launches()
    loss = mfd.distill_loss(student, detached[teacher], labels, hard_weight=0.5, backend="cuda")
    assert launches() == before + 1
    (2 * loss).backward()
    assert launches() == before + 2, "the gradient is scaled by one launch that looks at its factor"
    loss = mfd.distill_loss(student, of, temperature=torch.tensor(2.0, requires_grad=True), reduction="none",
                            backend="cuda")  # fmt: skip
    assert launches() == before + 3
    loss.sum().backward()
    assert launches() == before + 4


def test_many_rows_are_counted_by_a_launch_of_their_own():
    rows = 8200
    generator = torch.Generator().manual_seed(0)
    student = torch.randn((rows, 3), generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    labels[::5] = -100
    call = {"teacher": torch.randn((rows, 3), generator=generator), "labels": labels, "hard_weight": 0.5}
    losses = [LOSS.op(student, **call, backend=b) for b in ("cuda", "reference")]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
