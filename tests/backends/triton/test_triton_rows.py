"""The row kernels where tiles matter: rows longer than a tile, labels in every tile, and nearly equal distributions."""

import pytest
import torch
from harness import assert_obeys_rule, assert_same, evaluate, on, reference64
from op_db import RECORDS

import mfd_fast as mfd
from mfd_fast.testing import distill_inputs

DIVERGENCES = [
    mfd.ForwardKL(),
    mfd.ReverseKL(),
    mfd.JSD(0.3),
    mfd.SkewKL(),
    mfd.SkewReverseKL(),
    mfd.TVD(),
    mfd.AlphaBeta(0.5, 0.7),
    mfd.AlphaBeta(0.6, -0.6),
    mfd.DKD(),
    mfd.NKD(),
]
#: float64 rows of more columns take several tiles.
LONG = 1100
STANDARDIZE = mfd.LogitTransform(scale=0.8, softcap=9.0, standardize=True)

over_divergences = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


def arguments(classes, **options):
    made = distill_inputs((3, classes), dtype=torch.float64, seed=classes)
    labels = torch.tensor([0, classes - 1, classes // 2])
    return {"student": made.student, "teacher": made.teacher, "labels": labels, **options}


@over_divergences
@pytest.mark.parametrize("standardized", [False, True], ids=["raw", "standardized"])
def test_rows_longer_than_a_tile(divergence, standardized):
    """All terms and gradients, both temperatures included, and the scalar loss, against the reference."""
    transform = STANDARDIZE if standardized else None
    both = {"divergence": divergence, "student_transform": transform, "teacher_transform": transform}
    temperature = torch.tensor([0.7, 1.0, 3.0], dtype=torch.float64)
    terms = arguments(LONG, **both, temperature=temperature, teacher_temperature=torch.tensor(1.5).double())
    scalar = arguments(LONG, **both, temperature=1.7, hard_weight=0.5, label_smoothing=0.1)
    for name, sample, names in (("distill_terms", terms, None), ("distill_loss", scalar, ("student",))):
        record = RECORDS[name]
        found = evaluate(record, on(record, "triton"), sample, names=names)
        assert_same(found, reference64(record, sample, names=names), f"{divergence} {name}", rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [7, LONG])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per_row"])
@pytest.mark.parametrize(
    "divergence", [d for d in DIVERGENCES if d.name in ("forward_kl", "jsd", "dkd", "nkd")], ids=str
)
def test_several_teachers(divergence, per_row, classes):
    """The mixture of three, and the gradients of everything, weights and temperatures included."""
    record = RECORDS["distill_terms"]
    more = [distill_inputs((3, classes), dtype=torch.float64, seed=classes + k).teacher for k in (1, 2)]
    transform = mfd.LogitTransform(scale=0.8, softcap=9.0, standardize=per_row)
    sample = arguments(classes, divergence=divergence, teacher_transform=transform)
    weights = torch.tensor([[0.2, 1.0, 0.5], [1.0, 0.0, 2.0], [0.3, 0.3, 0.4]], dtype=torch.float64)
    sample |= {
        "teacher": [sample["teacher"], *more],
        "teacher_weights": weights if per_row else weights[0],
        "mask": torch.tensor([True, True, False]),
        "temperature": torch.tensor([0.7, 1.0, 3.0], dtype=torch.float64),
        "teacher_temperature": torch.tensor(1.5, dtype=torch.float64),
    }
    names = ("student", "teacher", "temperature", "teacher_temperature", "teacher_weights")
    found = evaluate(record, on(record, "triton"), sample, names=names)
    exact = reference64(record, sample, names=names)
    assert_same(found, exact, str(divergence), rtol=1e-10, atol=1e-12)


@over_divergences
@pytest.mark.parametrize("road", ["scalar", "recompute"])
@pytest.mark.parametrize("distance", ["near", "almost"])
def test_gradient_of_a_near_teacher_in_bfloat16(divergence, road, distance):
    """Within 0.3 % of float64, in the norm, and what bfloat16 itself rounds away."""
    record = RECORDS["distill_loss"]
    made = distill_inputs((8, 101), distance=distance, dtype=torch.bfloat16, seed=5)
    sample = {"student": made.student, "teacher": made.teacher, "labels": made.labels, "divergence": divergence}
    names = ("student",) if road == "scalar" else ("student", "teacher")
    found = evaluate(record, on(record, "triton"), sample, names=names)
    exact = reference64(record, sample, names=names)
    for name, grad in found.grads.items():
        true = exact.grads[name]
        error = (grad.double() - true).norm() / true.norm()
        rounding = (true.bfloat16().double() - true).norm() / true.norm()
        assert error <= 3e-3 + rounding, name
    rows = {**sample, "reduction": "none"}
    value = evaluate(record, on(record, "triton"), rows, names=())
    assert bool((value.outputs["loss"] >= 0).all())
    eager = evaluate(record, lambda **a: {"loss": record.eager(**a)}, rows, names=())
    assert_obeys_rule(value, reference64(record, rows, names=()), eager, str(divergence))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_two_standardized_classes_keep_their_tiny_gradient(dtype):
    """Two classes standardise to the same two numbers but for the 1e-7 beside the deviation."""
    record = RECORDS["distill_loss"]
    made = distill_inputs((6, 2), dtype=dtype, seed=3, spread=0.1)
    sample = {"student": made.student, "teacher": made.teacher, "labels": made.labels, "hard_weight": 0.5}
    sample |= {"student_transform": STANDARDIZE, "teacher_transform": STANDARDIZE}
    for names in (("student",), ("student", "teacher")):
        found = evaluate(record, on(record, "triton"), sample, names=names)
        exact = reference64(record, sample, names=names)
        for name, grad in found.grads.items():
            assert bool((exact.grads[name] != 0).any()), name
            scale = float(exact.grads[name].abs().max())
            torch.testing.assert_close(grad.double(), exact.grads[name], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
@pytest.mark.parametrize("classes", [40, 5000])
def test_a_label_of_minus_infinity_beside_a_soft_term(classes, divergence, label_smoothing):
    """The total variation of such rows is finite, so that nothing but the label shows them."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, classes).bfloat16()
    labels = torch.tensor([1, 0, 2])
    student[0, 1] = student[1, 5] = -torch.inf
    found = {}
    for backend in ("triton", "reference"):
        x = student.clone().requires_grad_()
        options = {"divergence": divergence, "hard_weight": 0.5, "label_smoothing": label_smoothing}
        loss = mfd.distill_loss(x, teacher, labels, **options, reduction="none", backend=backend)
        found[backend] = loss.detach(), torch.autograd.grad(loss.sum(), x)[0]
    torch.testing.assert_close(found["triton"][0], found["reference"][0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found["triton"][1], found["reference"][1], rtol=2e-2, atol=1e-2)
