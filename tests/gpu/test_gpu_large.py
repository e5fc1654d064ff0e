"""More than 2**31 elements and more than 65535 rows: whole calls against the same op on parts of the rows."""

import gc

import pytest
import torch
from harness import OpRecord
from on_device import DEVICE, ON_GPU, here
from op_db import RECORDS
from steps import OP_IDS, OPS

import mfd_fast as mfd

LIMIT = 2**31 if ON_GPU else 1 << 12
PARTS = 3
#: Elements of a row.
WIDTHS = {"wide": 131072, "tall": 64} if ON_GPU else {"wide": 1024, "tall": 8}
BF16 = torch.bfloat16
ROW_OPS = [(record, backend) for record, backend in OPS if record.name != "distill_terms"]
ROW_IDS = [i for (record, _), i in zip(OPS, OP_IDS, strict=True) if record.name != "distill_terms"]


@pytest.fixture(autouse=True)
def _empty_memory():
    yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def drawn(rows, width, scale=1.0):
    """Normal numbers, drawn on the device."""
    return torch.empty((rows, width), dtype=BF16, device=DEVICE).normal_(std=scale)


def distill_loss(rows, width):
    labels = torch.randint(width, (rows,), device=DEVICE)
    whole = {"student": drawn(rows, width, 3.0), "teacher": drawn(rows, width, 3.0), "labels": labels}
    return whole, {"hard_weight": 0.5, "temperature": 2.0, "reduction": "sum"}


def linear_distill_loss(rows, width):
    """Hidden states and teacher logits of that width; the rows of a chunk are few."""
    whole = {"student_hidden": drawn(rows, width), "teacher_hidden": drawn(rows, width)}
    weights = {"student_weight": drawn(8, width, 0.1), "teacher_weight": drawn(8, width, 0.1)}
    return whole, {**weights, "temperature": 2.0, "reduction": "sum"}


def modal_pool(rows, width):
    return {"features": [drawn(rows, width), drawn(rows, width)]}, {"query": drawn(1, width)[0]}


def feature_loss(rows, width):
    return {"student": drawn(rows, width), "teacher": drawn(rows, width)}, {"kind": "smooth_l1", "reduction": "sum"}


def mfd_loss(rows, width):
    head = {"query": drawn(1, width)[0], "head_weight": drawn(8, width, 0.1), "head_bias": drawn(1, 8)[0]}
    whole = {"features": [drawn(rows, width), drawn(rows, width)], "teacher_logits": drawn(rows, 8)}
    return whole, {**head, "reduction": "sum"}


MAKE = {f.__name__: f for f in (distill_loss, linear_distill_loss, modal_pool, feature_loss, mfd_loss)}


def of_rows(value, rows):
    return [v[rows] for v in value] if isinstance(value, list) else value[rows]


def computed(record: OpRecord, backend: str, whole, shared, up=None):
    """The first output, and the gradients of the tensors with rows that come first among the arguments."""
    first = next(iter(whole))
    leaves = [t.detach().requires_grad_() for t in (whole[first] if isinstance(whole[first], list) else [whole[first]])]
    given = {**whole, first: leaves if isinstance(whole[first], list) else leaves[0]}
    outputs = record.outputs(here(record.op)(**given, **shared, backend=backend))
    value = next(iter(outputs.values()))
    return value.detach(), torch.autograd.grad(value, leaves, up)


@pytest.mark.parametrize("form", WIDTHS)
@pytest.mark.parametrize(("record", "backend"), ROW_OPS, ids=ROW_IDS)
def test_more_elements_than_32_bits_count(record, backend, form):
    width = WIDTHS[form] if "distill" in record.name else min(WIDTHS[form], 1024)
    rows = LIMIT // width + 3
    assert rows * width > LIMIT
    assert rows > 65535 or form == "wide" or not ON_GPU
    whole, shared = MAKE[record.name](rows, width)
    up = drawn(rows, width) if record.name == "modal_pool" else None
    value, grads = computed(record, backend, whole, shared, up)
    total, step = 0.0, (rows + PARTS - 1) // PARTS
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        some = {k: of_rows(v, part) for k, v in whole.items()}
        small, gradients = computed(record, backend, some, shared, None if up is None else up[part])
        for grad, expected in zip(grads, gradients, strict=True):
            torch.testing.assert_close(grad[part], expected, rtol=2**-7, atol=1e-4)
        if value.dim():
            torch.testing.assert_close(value[part], small, rtol=2**-7, atol=1e-3)
        else:
            total += small.double()
    if not value.dim():
        torch.testing.assert_close(value.double(), total, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_rows_far_apart(backend):
    """Two rows more than 2**31 elements from each other."""
    width, apart = 40, LIMIT + 8
    buffer = torch.zeros(apart + width, dtype=BF16, device=DEVICE)
    student = buffer.as_strided((2, width), (apart, 1))
    student.copy_(drawn(2, width))
    teacher = drawn(2, width)
    far, near = (
        here(mfd.distill_loss)(x, teacher, reduction="none", backend=backend) for x in (student, student.contiguous())
    )
    torch.testing.assert_close(far, near, rtol=0, atol=0)
    assert set(MAKE) == {record.name for record in RECORDS.values()} - {"distill_terms"}
