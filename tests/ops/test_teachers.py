"""Sparse teachers (TopK) and several teachers, against what they stand for."""

import math

import pytest
import torch
from harness import evaluate, on
from op_db import BACKEND_FEATURES, RECORDS

import mfd_fast as mfd
from mfd_fast.testing import assert_bitwise_equal, distill_inputs

RECORD = RECORDS["distill_loss"]
TOPK = [b for b in RECORD.backends if "topk" in BACKEND_FEATURES[b]]
SEVERAL = [b for b in RECORD.backends if "teachers" in BACKEND_FEATURES[b]]
ORDINARY = [
    *("forward_kl", "cross_entropy", "reverse_kl", mfd.JSD(0.3)),
    *(mfd.SkewKL(), mfd.SkewReverseKL(), "tvd", mfd.AlphaBeta(0.6, 0.3)),
]
LABELLED = ["dkd", "nkd"]
MIXED = [(b, d) for b in SEVERAL for d in ORDINARY + LABELLED]


def sparse(rows=5, classes=9, k=4, dtype=torch.float64, seed=0):
    both = distill_inputs((rows, classes), dtype=dtype, spread=1.0, seed=seed)
    values, indices = torch.log_softmax(both.teacher, -1).topk(k, -1)
    return both.student, values.flip(-1), indices.flip(-1), indices[:, 0].clone()


def loss(student, teacher, labels, backend="reference", **options):
    """Per row, and the student's gradient."""
    leaf = student.clone().requires_grad_()
    value = mfd.distill_loss(leaf, teacher, labels, reduction="none", backend=backend, **options)
    return value, torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("backend", TOPK)
@pytest.mark.parametrize("divergence", ORDINARY + LABELLED, ids=str)
def test_bucket_is_a_row_of_one_more_class(backend, divergence):
    """At T = 1: both sides as K + 1 classes, the last one holding everything else."""
    student, values, indices, labels = sparse()
    found, grad = loss(student, mfd.TopK(values, indices), labels, backend, divergence=divergence)
    leaf = student.clone().requires_grad_()
    log_q = torch.log_softmax(leaf, -1)
    rest = log_q.exp().scatter(-1, indices, 0.0).sum(-1, keepdim=True)
    q = torch.cat([log_q.gather(-1, indices), rest.log()], -1)
    p = torch.cat([values, (1 - values.exp().sum(-1, keepdim=True)).log()], -1)
    at = (indices == labels[:, None]).int().argmax(-1)
    expected = mfd.distill_loss(q, p, at, reduction="none", divergence=divergence, backend="reference")
    torch.testing.assert_close(found, expected.detach(), check_dtype=False)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), leaf)[0], check_dtype=False)


@pytest.mark.parametrize("backend", TOPK)
@pytest.mark.parametrize("values_are", ["logprobs", "logits"])
@pytest.mark.parametrize("divergence", ORDINARY + LABELLED, ids=str)
def test_renormalize_is_a_row_of_k_classes(backend, divergence, values_are):
    student, values, indices, labels = sparse()
    teacher = mfd.TopK(values, indices, tail="renormalize", values_are=values_are)
    options = {"divergence": divergence, "temperature": 2.0, "teacher_temperature": 1.5}
    found, grad = loss(student, teacher, labels, backend, **options)
    leaf = student.clone().requires_grad_()
    at = (indices == labels[:, None]).int().argmax(-1)
    expected = mfd.distill_loss(leaf.gather(-1, indices), values, at, reduction="none", backend="reference", **options)
    torch.testing.assert_close(found, expected.detach(), check_dtype=False)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), leaf)[0], check_dtype=False)


@pytest.mark.parametrize("backend", TOPK)
def test_zero_is_what_is_listed_and_nothing_else(backend):
    """Σ over the K classes of p (log p − log q), q over all classes, at T = 1."""
    student, values, indices, _ = sparse()
    found, grad = loss(student, mfd.TopK(values, indices, tail="zero"), None, backend)
    leaf = student.clone().requires_grad_()
    log_q = torch.log_softmax(leaf, -1).gather(-1, indices)
    expected = (values.exp() * (values - log_q)).sum(-1)
    torch.testing.assert_close(found, expected.detach(), check_dtype=False)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), leaf)[0], check_dtype=False)
    q, p = torch.softmax(student, -1), torch.zeros_like(student).scatter(-1, indices, values.exp())
    found, _ = loss(student, mfd.TopK(values, indices, tail="zero"), None, backend, divergence="tvd")
    torch.testing.assert_close(found, (p - q).abs().sum(-1) / 2, check_dtype=False)


@pytest.mark.parametrize("backend", TOPK)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
@pytest.mark.parametrize("divergence", ORDINARY + LABELLED, ids=str)
def test_all_classes_listed_is_the_dense_teacher(backend, tail, divergence):
    student, values, indices, labels = sparse(k=9)
    dense = torch.empty_like(values).scatter(-1, indices, values)
    found, grad = loss(student, mfd.TopK(values, indices, tail=tail), labels, backend, divergence=divergence)
    expected, dense_grad = loss(student, dense, labels, divergence=divergence)
    torch.testing.assert_close(found, expected, check_dtype=False)
    torch.testing.assert_close(grad, dense_grad, check_dtype=False)


@pytest.mark.parametrize("backend", TOPK)
@pytest.mark.parametrize("tail", ["bucket", "zero"])
def test_temperature_softens_the_rest_as_one_class(backend, tail):
    student, values, indices, _ = sparse()
    found, _ = loss(student, mfd.TopK(values, indices, tail=tail), None, backend, temperature=2.0)
    rest = (1 - values.exp().sum(-1, keepdim=True)).log()
    p = torch.softmax(torch.cat([values, rest], -1) / 2, -1)
    q = torch.softmax(student / 2, -1)
    listed = q.gather(-1, indices)
    expected = (p[:, :-1] * (p[:, :-1] / listed).log()).sum(-1)
    if tail == "bucket":
        expected = expected + p[:, -1] * (p[:, -1] / (1 - listed.sum(-1))).log()
    torch.testing.assert_close(found, 4 * expected, check_dtype=False)


@pytest.mark.parametrize("backend", TOPK)
@pytest.mark.parametrize("k", [1, 2, 1024])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_from_one_to_1024_classes(backend, k, dtype):
    student, values, indices, labels = sparse(rows=3, classes=1500, k=k, dtype=torch.float32)
    for tail in ("bucket", "renormalize", "zero"):
        teacher = mfd.TopK(values, indices.to(dtype), tail=tail)
        found, grad = loss(student, teacher, labels, backend)
        wide = mfd.TopK(values.double(), indices, tail=tail)
        exact, exact_grad = loss(student.double(), wide, labels)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", TOPK)
def test_rows_that_do_not_exist_are_not_checked(backend):
    student, values, indices, _ = sparse()
    mask = torch.tensor([True, False, True, True, True])
    clean = loss(student, mfd.TopK(values, indices), None, backend, mask=mask)
    values, indices = values.clone(), indices.clone()
    values[1], indices[1] = math.nan, 10**6
    for a, b in zip(loss(student, mfd.TopK(values, indices), None, backend, mask=mask), clean, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("backend", TOPK)
def test_by_products_of_a_sparse_teacher(backend):
    student, values, indices, labels = sparse()
    terms = mfd.distill_terms(student, mfd.TopK(values, indices), labels, backend=backend)
    rest = 1 - values.exp().sum(-1)
    entropy = -(values.exp() * values).sum(-1) - rest * rest.log()
    torch.testing.assert_close(terms.teacher_entropy, entropy, check_dtype=False)
    at_label = (values.exp() * (indices == labels[:, None])).sum(-1)
    torch.testing.assert_close(terms.teacher_label_prob, at_label, check_dtype=False)
    best = indices.gather(-1, values.argmax(-1, keepdim=True)).squeeze(-1)
    assert torch.equal(terms.agreement, student.argmax(-1) == best)
    elsewhere = (torch.arange(9) != indices[:, :, None]).all(1).int().argmax(-1)
    other = mfd.distill_terms(student, mfd.TopK(values, indices), elsewhere, backend=backend)
    assert not bool(other.teacher_label_prob.any())


def broken(**changes):
    student, values, indices, labels = sparse()
    given = {"values": values, "indices": indices, "tail": "bucket", "values_are": "logprobs"}
    options = {k: v for k, v in changes.items() if k not in given}
    return student, {**given, **{k: v for k, v in changes.items() if k in given}}, labels, options


INTS = torch.arange(4).expand(5, 4)
BROKEN = [
    ({"values": [1.0]}, TypeError, "TopK: values must be a dense floating-point tensor, got list"),
    ({"values": INTS}, TypeError, "TopK: values must be a dense floating-point tensor, got torch.int64"),
    ({"values": torch.zeros(5, 4).to_sparse()}, TypeError, "TopK: values must be a dense .*got .*float32 .*sparse"),
    ({"indices": INTS.to_sparse()}, TypeError, "TopK: indices must be a dense .*got .*int64 .*sparse"),
    ({"indices": INTS.double()}, TypeError, "TopK: indices must be a dense int64 or int32 tensor"),
    ({"indices": INTS[:, :3]}, ValueError, r"TopK: values and indices must have one shape .*\[5, 4\] and \[5, 3\]"),
    ({"values": torch.zeros(5, 0), "indices": INTS[:, :0]}, ValueError, r"TopK: K must be in \[1, 1024\], got 0"),
    (
        {"values": torch.zeros(5, 1025), "indices": torch.arange(1025).expand(5, -1)},
        ValueError,
        r"TopK: K must be in \[1, 1024\], got 1025",
    ),
    ({"tail": "drop"}, ValueError, "TopK: tail must be one of 'bucket', 'renormalize', 'zero', got 'drop'"),
    ({"values_are": "probs"}, ValueError, "TopK: values_are must be one of 'logprobs', 'logits', got 'probs'"),
    (
        {"values": torch.zeros(5, 10), "indices": torch.arange(10).expand(5, -1)},
        ValueError,
        "distill_loss: teacher must list at most 9 classes .* got K = 10",
    ),
    (
        {"values": torch.zeros(4, 4), "indices": INTS[:4]},
        ValueError,
        r"distill_loss: teacher must be of shape \[5, 'C'\]",
    ),
    ({"indices": INTS + 6}, ValueError, r"teacher.indices must be in \[0, 9\), got 9 in row 0"),
    ({"indices": INTS - 1}, ValueError, r"teacher.indices must be in \[0, 9\), got -1 in row 0"),
    ({"indices": INTS // 2}, ValueError, "teacher.indices must differ within a row, got 0 twice in row 0"),
    ({"tail": "zero", "divergence": "reverse_kl"}, ValueError, r"ReverseKL\(\) is infinite where the teacher is 0"),
    ({"tail": "zero", "divergence": mfd.AlphaBeta(-0.5, 1.0)}, ValueError, "AlphaBeta.* is infinite where"),
    ({"values_are": "logits", "divergence": "reverse_kl"}, ValueError, "infinite .*tail='bucket', values_are='logits'"),
    ({"tail": "zero", "divergence": "dkd"}, ValueError, "dkd needs a whole teacher distribution"),
    ({"tail": "zero", "divergence": "nkd"}, ValueError, "nkd needs a whole teacher distribution"),
    ({"teacher_transform": mfd.LogitTransform(scale=2.0)}, ValueError, "teacher_transform needs the whole row"),
    ({"teacher_weights": torch.ones(1)}, ValueError, "teacher must be a sequence of tensors when teacher_weights"),
]


@pytest.mark.parametrize(("changes", "error", "match"), BROKEN, ids=[str(k) for k in range(len(BROKEN))])
def test_errors_of_a_sparse_teacher(changes, error, match):
    student, given, labels, options = broken(**changes)
    with pytest.raises(error, match=match):
        mfd.distill_loss(student, mfd.TopK(**given), labels, **options)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("backend", TOPK)
def test_a_label_outside_the_list_raises_where_it_is_needed(backend, name):
    student, values, indices, labels = sparse()
    labels[2] = next(c for c in range(9) if c not in indices[2].tolist())
    teacher = mfd.TopK(values, indices)
    with pytest.raises(ValueError, match=f"{name} needs the label among teacher.indices, got label .* in row 2"):
        mfd.distill_loss(student, teacher, labels, divergence=name, backend=backend)
    mfd.distill_loss(student, teacher, labels, hard_weight=1.0, backend=backend)


def three(dtype=torch.float64, rows=5, classes=7):
    made = [distill_inputs((rows, classes), dtype=dtype, seed=s) for s in range(3)]
    return made[0].student, [m.teacher for m in made], made[0].labels


@pytest.mark.parametrize(("backend", "divergence"), MIXED, ids=str)
@pytest.mark.parametrize("weights", ["equal", "shared", "per_row"])
def test_several_teachers_are_the_mixture_of_their_probabilities(backend, divergence, weights):
    student, teachers, labels = three()
    w = {"equal": None, "shared": torch.tensor([1.0, 2.0, 5.0]), "per_row": torch.rand(5, 3) + 0.1}[weights]
    options = {"divergence": divergence, "temperature": 2.0, "teacher_temperature": 3.0}
    found, grad = loss(student, teachers, labels, backend, teacher_weights=w, **options)
    share = torch.full((3,), 1 / 3) if w is None else w / w.sum(-1, keepdim=True)

    def mixture(temperature):
        each = torch.stack([torch.softmax(t / temperature, -1) for t in teachers], -1)
        return (each * share.double().reshape(-1, 1, 3)).sum(-1).log()

    # Logits whose softmax at T_t = 3 is the mixture. NKD reads the mixture at 1 as well.
    expected, expected_grad = loss(student, 3 * mixture(3.0), labels, **options)
    if divergence == "nkd":
        first = options | {"divergence": mfd.NKD(0.0), "teacher_temperature": 1.0}
        wrong, right = loss(student, 3 * mixture(3.0), labels, **first), loss(student, mixture(1.0), labels, **first)
        expected, expected_grad = expected - wrong[0] + right[0], expected_grad - wrong[1] + right[1]
    torch.testing.assert_close(found, expected, check_dtype=False)
    torch.testing.assert_close(grad, expected_grad, check_dtype=False)


@pytest.mark.parametrize("backend", SEVERAL)
def test_a_teacher_of_weight_zero_has_no_say_but_hides_no_nan(backend):
    student, teachers, labels = three(torch.float32)
    w = torch.tensor([1.0, 0.0, 3.0])
    found, grad = loss(student, teachers, labels, backend, teacher_weights=w)
    others = loss(student, [teachers[0], teachers[2]], labels, backend, teacher_weights=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found, others[0])
    torch.testing.assert_close(grad, others[1])
    teachers[1] = teachers[1].clone()
    teachers[1][2, 3] = math.nan
    assert loss(student, teachers, labels, backend, teacher_weights=w)[0].isnan().tolist() == [c == 2 for c in range(5)]


@pytest.mark.parametrize("backend", RECORD.backends)
def test_a_sequence_of_one_is_that_teacher(backend):
    student, teachers, labels = three(torch.float32)
    for one in ([teachers[0]], (teachers[0],)):
        for w in (None, torch.tensor([4.0])):
            found = loss(student, one, labels, backend, teacher_weights=w)
            for a, b in zip(found, loss(student, teachers[0], labels, backend), strict=True):
                assert_bitwise_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"teacher": []}, ValueError, "teacher must be a tensor, a TopK or a non-empty sequence of tensors"),
        ({"teacher": [torch.zeros(5, 7), None]}, TypeError, r"teacher\[1\] must be a tensor, got NoneType"),
        ({"teacher": [torch.zeros(5, 7), torch.zeros(4, 7)]}, ValueError, r"teacher\[1\] must be of shape \[5, 'C'\]"),
        ({"teacher": [torch.zeros(5, 7), torch.zeros(5, 8)]}, ValueError, "teacher must have as many classes"),
        ({"teacher_weights": torch.ones(2)}, ValueError, r"teacher_weights must be of shape \[3\] or \[5, 3\]"),
        ({"teacher_weights": [1.0] * 3}, TypeError, "teacher_weights must be a tensor"),
        ({"teacher_weights": torch.ones(3).long()}, TypeError, "teacher_weights must be .*float.*got a int64"),
        ({"teacher_weights": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "teacher_weights must be finite and >= 0"),
        ({"teacher_weights": torch.zeros(3)}, ValueError, "teacher_weights must be .* a finite sum > 0"),
        ({"teacher_weights": torch.tensor([1.0, torch.nan, 1.0])}, ValueError, "teacher_weights must be finite .* nan"),
        ({"teacher_weights": torch.tensor([1.0, torch.inf, 1.0])}, ValueError, "teacher_weights must be finite .* inf"),
        ({"teacher_weights": torch.full((5, 3), 3e38)}, ValueError, "teacher_weights must be .* sums from inf to inf"),
        ({"teacher_weights": torch.ones(3, device="meta")}, ValueError, "teacher_weights must be on cpu"),
        (
            {"teacher": torch.zeros(5, 7), "teacher_weights": torch.ones(1)},
            ValueError,
            "teacher must be a sequence of tensors when teacher_weights is given",
        ),
    ],
)
def test_errors_of_several_teachers(changes, error, match):
    student, teachers, _ = three(torch.float32)
    with pytest.raises(error, match=f"distill_loss: {match}"):
        mfd.distill_loss(student, **{"teacher": teachers, **changes})


@pytest.mark.parametrize("backend", SEVERAL)
def test_one_tensor_in_every_role(backend):
    """Student, both teachers: each role's gradient once."""
    leaf = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 6, dtype=torch.float64)

    def f(x):
        return mfd.distill_loss(x, [x * 1.0, other, x], divergence="jsd", backend=backend)

    assert torch.autograd.gradcheck(f, (leaf,))
    same = mfd.distill_loss(leaf, [leaf, leaf], divergence="jsd", backend=backend)
    assert float(same.detach().abs()) < 1e-12
    assert float(torch.autograd.grad(same, leaf)[0].abs().max()) < 1e-12


def test_modules_take_every_kind_of_teacher():
    student, values, indices, _ = sparse(classes=7)
    _, teachers, _ = three()
    for teacher, options in (
        (mfd.TopK(values, indices), {"divergence": "jsd"}),
        (teachers, {"teacher_weights": torch.tensor([1.0, 2.0, 3.0])}),
    ):
        module = mfd.nn.DistillationLoss(temperature=2.0, **options)
        assert_bitwise_equal(module(student, teacher), mfd.distill_loss(student, teacher, temperature=2.0, **options))


def test_the_tables_name_known_backends():
    assert set(BACKEND_FEATURES) == set(RECORD.backends)
    assert evaluate(RECORD, on(RECORD, "reference"), RECORD.samples()["teachers"]).grads.keys() >= {"teacher_weights"}
