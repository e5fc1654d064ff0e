"""Every way in which the device's threads share rows: which one is chosen, and that all give the same numbers."""

import pytest
import torch
from harness import assert_obeys_rule, assert_same, evaluate, on, reference64, stacked
from op_db import RECORDS

from mfd_fast import contract
from mfd_fast.backends import cuda
from mfd_fast.backends.cuda import distill_loss as backend

LOSS = RECORDS["distill_loss"]
A100, H100, RTX = (80, 4, 166912), (90, 4, 232448), (120, 4, 101376)


@pytest.fixture
def emulate():
    """Sets the emulated device: capability, processors, bytes of shared memory per block."""
    yield cuda.native().set_device
    cuda.native().set_device(*H100)


def plan(classes, dtype, rows=2):
    logits = torch.zeros((1, classes), dtype=dtype).expand(rows, classes)
    return backend.plan(contract.check_rows("distill_loss", logits, logits, None))


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
    actual, exact, eager = [], [], []
    for seed in range(3):
        arguments = LOSS.samples(dtype=dtype, rows=5, classes=classes, seed=seed)[name]
        one = {"names": ("student",)}
        actual.append(evaluate(LOSS, on(LOSS, "cuda"), arguments, **one))
        exact.append(reference64(LOSS, arguments, **one))
        eager.append(evaluate(LOSS, lambda **a: {"loss": LOSS.eager(**a)}, arguments, **one))
    assert_obeys_rule(*(stacked(r) for r in (actual, exact, eager)), f"{rung} {name}")


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
def test_rows_that_are_not_aligned(emulate, rung, offset):
    """Odd class counts and storage offsets: no 16-byte access is possible."""
    device, classes = RUNGS[rung]
    emulate(*device)
    classes += 3
    arguments = LOSS.samples(dtype=torch.bfloat16, rows=3, classes=classes)["plain"]
    moved = {
        k: torch.cat([v.new_zeros(offset), v.flatten()])[offset:].view_as(v) if torch.is_tensor(v) else v
        for k, v in arguments.items()
    }
    one = {"names": ("student",)}
    exact = evaluate(LOSS, on(LOSS, "cuda"), arguments, **one)
    assert_same(evaluate(LOSS, on(LOSS, "cuda"), moved, **one), exact, rung)


def test_many_rows_are_counted_by_a_launch_of_their_own():
    rows = 8200
    generator = torch.Generator().manual_seed(0)
    student = torch.randn((rows, 3), generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    labels[::5] = -100
    call = {"teacher": torch.randn((rows, 3), generator=generator), "labels": labels, "hard_weight": 0.5}
    losses = [LOSS.op(student, **call, backend=b) for b in ("cuda", "reference")]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
