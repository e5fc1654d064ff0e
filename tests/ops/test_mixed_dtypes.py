"""Student and teacher of different dtypes: the arithmetic is that of the wider one, and no kernel leaves a tensor."""

import itertools

import pytest
import torch
from harness import map_tensors
from plan_calls import random, tensors_in

import mfd_fast as mfd

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABELS = torch.tensor([0, 1, 10, -100, 4, 5])


def pair(student, teacher):
    return {"student": random(6, 11, dtype=student), "teacher": random(6, 11, dtype=teacher, seed=1)}


def heads(student, teacher):
    return {
        "student_hidden": random(6, 8, dtype=student),
        "student_weight": random(11, 8, dtype=student, seed=1),
        "student_bias": random(11, dtype=student, seed=2),
        "teacher_hidden": random(6, 4, dtype=teacher, seed=3),
        "teacher_weight": random(11, 4, dtype=teacher, seed=4),
        "teacher_bias": random(11, dtype=teacher, seed=5),
    }


def pooled_head(student, teacher):
    return {
        "features": [random(6, 8, dtype=student), random(6, 8, dtype=student, seed=1)],
        "query": random(8, dtype=student, seed=2),
        "head_weight": random(11, 8, dtype=student, seed=3),
        "head_bias": random(11, dtype=student, seed=4),
        "teacher_logits": random(6, 11, dtype=teacher, seed=5),
        "teacher_features": random(6, 8, dtype=teacher, seed=6),
        "feature_weight": 0.5,
    }


ROWS = {"labels": LABELS, "hard_weight": 0.5, "ignored_labels": "term"}
CALLS = {
    "distill_loss": (mfd.distill_loss, lambda *dtypes: pair(*dtypes) | ROWS | {"return_parts": True}),
    "feature_loss": (mfd.feature_loss, pair),
    "linear_distill_loss": (
        mfd.linear_distill_loss,
        lambda *dtypes: heads(*dtypes) | {k: ROWS[k] for k in list(ROWS)[:2]},
    ),
    "mfd_loss": (mfd.mfd_loss, lambda *dtypes: pooled_head(*dtypes) | ROWS),
}
PAIRS = [
    pytest.param(*dtypes, marks=() if dtypes == (torch.bfloat16, torch.float64) else pytest.mark.rest)
    for dtypes in itertools.permutations(DTYPES, 2)
]
OF_TEACHERS = ("teacher", "teacher_logits", "teacher_features", "teacher_hidden", "teacher_weight", "teacher_bias")


def run(op, arguments, backend):
    """Outputs and the gradients of all that is the student's."""
    arguments = {
        k: v
        if k in OF_TEACHERS
        else map_tensors(v, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)
        for k, v in arguments.items()
    }
    outputs = tensors_in(op(**arguments, backend=backend))
    leaves = [t for t in tensors_in(list(arguments.values())) if t.requires_grad]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs[0], leaves)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize("backend", ["cpu", *(pytest.param(b, marks=pytest.mark.rest) for b in ("triton", "cuda"))])
def test_sides_of_two_dtypes_against_float64(name, student, teacher, backend):
    op, arguments = CALLS[name]
    given = arguments(student, teacher)
    exact = run(op, map_tensors(given, lambda t: t.double() if t.is_floating_point() else t), "reference")
    for _ in range(2):  # checked, and by its plan
        for found, wanted in zip(run(op, given, backend), exact, strict=True):
            if not found.is_floating_point():
                assert torch.equal(found, wanted)
                continue
            # The arithmetic's, a leaf's, and that of what a head of 16 bits gets.
            dtypes = [found.dtype, torch.promote_types(torch.promote_types(student, teacher), torch.float32)]
            if torch.float64 not in (student, teacher):
                dtypes.append(student)
            eps = max(torch.finfo(dtype).eps for dtype in dtypes)
            bound = 2 * eps if eps > 1e-4 else 16 * eps
            torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound * float(wanted.abs().max()))
