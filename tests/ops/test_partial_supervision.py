"""Rows without a label, calls without a teacher, students with fewer modalities, and the parts of a loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import watched
from op_db import RECORDS

import mfd_fast as mfd
from mfd_fast.testing import assert_bitwise_equal, distill_inputs

BACKENDS = RECORDS["distill_loss"].backends
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def made(rows=7, classes=9, ignored=(1, 4), **options):
    base = distill_inputs((rows, classes), **options)
    labels = base.labels.clone()
    labels[list(ignored)] = -100
    return base.student, base.teacher, labels


def gradient(call, leaf):
    leaf = leaf.detach().requires_grad_()
    result = call(leaf)
    loss = result if isinstance(result, torch.Tensor) else result.loss
    return result, torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_an_ignored_label_takes_the_hard_term_alone(backend, reduction, masked):
    """One call is the teacher's term of all rows and PyTorch's cross-entropy of those that have a label."""
    student, teacher, labels = made()
    mask = torch.arange(7) != 2 if masked else None
    exists = torch.ones(7, dtype=torch.bool) if mask is None else mask
    common = {"mask": mask, "reduction": reduction, "backend": backend}

    def one(x):
        options = {"soft_weight": 0.7, "hard_weight": 0.4, "temperature": 2.0, "ignored_labels": "term"}
        return mfd.distill_loss(x, teacher, labels, **options, **common)

    def two(x):
        hard = F.cross_entropy(x, torch.where(exists, labels, -100), reduction=reduction)
        return 0.7 * mfd.distill_loss(x, teacher, temperature=2.0, **common) + 0.4 * hard

    for found, expected in zip(gradient(one, student), gradient(two, student), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_in_a_row_without_a_label_makes_no_nan_of_its_hard_term(backend):
    """The hard term reads some logit of every row: −inf there is none of the loss's business."""
    student, teacher, labels = made()
    student[[1, 4], 0] = teacher[[1, 4], 0] = -math.inf
    student[2], teacher[2] = math.nan, math.inf  # masked
    mask = torch.arange(7) != 2
    weight = torch.ones(7).masked_fill(~mask, math.nan)

    def call(x):
        options = {"hard_weight": 0.5, "mask": mask, "weight": weight, "ignored_labels": "term"}
        return mfd.distill_loss(x, teacher, labels, **options, return_parts=True, backend=backend)

    result, grad = gradient(call, student)
    assert all(bool(value.isfinite()) for value in result)
    assert bool(grad.isfinite().all())
    assert not grad[2].any()
    soft = mfd.distill_loss(student, teacher, mask=mask, backend=backend)
    hard = F.cross_entropy(student[mask], labels[mask])
    torch.testing.assert_close(result.soft, soft, **CLOSE)
    torch.testing.assert_close(result.hard, hard, **CLOSE)
    terms = mfd.distill_terms(student, teacher, labels, mask=mask, ignored_labels="term", backend=backend)
    kept = (labels != -100) & mask
    for name in ("hard", "student_label_prob", "teacher_label_prob"):
        value = getattr(terms, name)
        assert not value[~kept].any(), name
        assert bool((value[kept] != 0).all()), name
    assert bool((terms.soft[mask] != 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_label_at_all_leaves_the_soft_term(backend):
    student, teacher, labels = made(ignored=range(7))
    options = {"hard_weight": 0.5, "ignored_labels": "term", "backend": backend}
    found = gradient(lambda x: mfd.distill_loss(x, teacher, labels, **options), student)
    expected = gradient(lambda x: mfd.distill_loss(x, teacher, backend=backend), student)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    nothing = mfd.distill_loss(student, teacher, labels, **options, mask=torch.zeros(7, dtype=torch.bool))
    assert nothing.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_of_normalizers_divides_each_term_by_its_own(backend):
    student, teacher, labels = made()
    options = {"hard_weight": 0.5, "return_parts": True, "backend": backend}
    for ignored in ("row", "term"):
        call = {**options, "ignored_labels": ignored}
        result = mfd.distill_loss(student, teacher, labels, **call, normalizer=(5.0, torch.tensor(3)))
        total = mfd.distill_loss(student, teacher, labels, **call, reduction="sum")
        torch.testing.assert_close(result.soft, total.soft / 5, **CLOSE)
        torch.testing.assert_close(result.hard, total.hard / 3, **CLOSE)
        torch.testing.assert_close(result.loss, total.soft / 5 + 0.5 * total.hard / 3, **CLOSE)
        one = mfd.distill_loss(student, teacher, labels, **call, normalizer=4.0)
        torch.testing.assert_close(one.loss, total.loss / 4, **CLOSE)
    # What has no term has no normalizer.
    alone = mfd.distill_loss(student, None, labels, soft_weight=0.0, hard_weight=1.0, normalizer=(5.0, 3.0))
    torch.testing.assert_close(alone, F.cross_entropy(student, labels, reduction="sum") / 3, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_a_teacher_the_loss_is_the_cross_entropy(backend, dtype, reduction):
    student, _, labels = made(dtype=dtype)
    unheard = {
        "divergence": "dkd",
        "temperature": 3.0,
        "teacher_temperature": 7.0,
        "teacher_transform": mfd.LogitTransform(standardize=True, classes=3),
    }

    def call(x):
        options = {"soft_weight": 0.0, "hard_weight": 0.6, "reduction": reduction, **unheard}
        return mfd.distill_loss(x, None, labels, **options, backend=backend)

    loss, grad = gradient(call, student)
    expected, of_expected = gradient(
        lambda x: 0.6 * F.cross_entropy(x.float(), labels, reduction=reduction).div(1.0), student
    )
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(grad, of_expected, rtol=2e-3, atol=1e-5)


def test_a_teacher_is_missing_only_where_its_term_is():
    student, _, labels = made()
    for weight in (1.0, torch.tensor(0.0)):
        with pytest.raises(
            TypeError, match="teacher must be a tensor where soft_weight is not the number 0, got NoneType"
        ):
            mfd.distill_loss(student, None, labels, soft_weight=weight, hard_weight=1.0)
    with pytest.raises(TypeError, match="distill_terms: teacher must be a tensor"):
        mfd.distill_terms(student, None, labels)
    features = [torch.randn(7, 4), torch.randn(7, 4)]
    with pytest.raises(TypeError, match="teacher_logits must be a tensor where soft_weight is not the number 0"):
        mfd.mfd_loss(features, None, torch.randn(9, 4), None, None, labels, hard_weight=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_the_forward_kl_and_the_teachers_entropy(backend, dtype):
    student, teacher, _ = made(classes=33, dtype=dtype)
    options = {"temperature": 2.0, "backend": backend}

    def soft(divergence):
        return lambda x: mfd.distill_loss(x, teacher, divergence=divergence, **options)

    (value, grad), (kl, of_kl) = gradient(soft("cross_entropy"), student), gradient(soft("forward_kl"), student)
    entropy = mfd.distill_terms(student, teacher, **options).teacher_entropy.mean()
    torch.testing.assert_close(value, kl + 4 * entropy, **CLOSE)
    torch.testing.assert_close(grad, of_kl, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    # The teacher's gradient is another: p (−log q − CE) in place of p (r − K).
    found = gradient(lambda y: mfd.distill_loss(student, y, divergence="cross_entropy", **options), teacher)[1]
    exact = gradient(
        lambda y: -4 * (torch.softmax(y / 2, -1) * torch.log_softmax(student.double() / 2, -1)).sum(-1).mean(),
        teacher.double(),
    )[1]
    torch.testing.assert_close(found.double(), exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_are_the_reduced_terms_and_leave_the_loss_as_it_is(backend, reduction, dtype):
    student, teacher, labels = made(dtype=dtype)
    weight = 0.5 + torch.rand(7)
    rows = {"mask": torch.arange(7) != 3, "temperature": 1.7, "ignored_labels": "term", "backend": backend}
    call = {**rows, "soft_weight": 0.3, "hard_weight": 0.8, "weight": weight, "reduction": reduction}
    parts, grad = gradient(lambda x: mfd.distill_loss(x, teacher, labels, **call, return_parts=True), student)
    loss, of_loss = gradient(lambda x: mfd.distill_loss(x, teacher, labels, **call), student)
    assert isinstance(parts, mfd.DistillOutput)
    torch.testing.assert_close(parts.loss, loss, **CLOSE)
    torch.testing.assert_close(grad, of_loss, rtol=2e-3 if dtype == torch.float16 else 2e-5, atol=1e-6)
    assert not any(part.requires_grad for part in parts[1:])
    terms = mfd.distill_terms(student, teacher, labels, **rows)
    for name in parts._fields[1:]:
        expected = getattr(terms, name) * weight
        count = (labels != -100)[rows["mask"]].sum() if name == "hard" else rows["mask"].sum()
        expected = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / count}[reduction]
        torch.testing.assert_close(getattr(parts, name), expected, **CLOSE, msg=name)
    with torch.no_grad():
        again = mfd.distill_loss(student, teacher, labels, **call, return_parts=True)
    for a, b in zip(again, parts, strict=True):
        torch.testing.assert_close(a, b.detach(), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_terms_that_are_not_computed_are_zero(backend):
    student, teacher, labels = made()
    options = {"return_parts": True, "backend": backend}
    hard = mfd.distill_loss(student, None, labels, soft_weight=0.0, hard_weight=2.0, **options)
    assert [bool(part) for part in hard] == [True, False, True, False, False]
    soft = mfd.distill_loss(student, teacher, labels, **options)
    assert [bool(part) for part in soft] == [True, True, False, True, True]
    none = mfd.distill_loss(student, teacher, labels, soft_weight=0.0, **options)
    assert not any(bool(part) for part in none)
    empty = mfd.distill_loss(student[:0], teacher[:0], labels[:0], hard_weight=1.0, **options)
    assert not any(bool(part) for part in empty)


def test_all_of_it_is_one_graph_to_a_compiler():
    student, teacher, labels = made()

    def step(x, by):
        options = {"hard_weight": 0.5, "ignored_labels": "term", "normalizer": by, "divergence": "cross_entropy"}
        result = mfd.distill_loss(x, teacher, labels, **options, return_parts=True, backend="cpu")
        return result, mfd.distill_loss(x, None, labels, soft_weight=0.0, hard_weight=1.0, backend="cpu")

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for by in (None, (torch.tensor(5.0), torch.tensor(3.0))):
        leaves = [student.clone().requires_grad_() for _ in range(2)]
        (parts, alone), (expected, of_labels) = compiled(leaves[0], by), step(leaves[1], by)
        for a, b in zip((*parts, alone), (*expected, of_labels), strict=True):
            torch.testing.assert_close(a, b)
        (parts.loss + alone).backward()
        (expected.loss + of_labels).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_arguments_are_checked():
    student, teacher, labels = made()

    def refused(error, match, **options):
        with pytest.raises(error, match=match):
            mfd.distill_loss(student, teacher, labels, **options)

    refused(ValueError, "ignored_labels must be one of 'row', 'term', got str 'none'", ignored_labels="none")
    refused(
        ValueError,
        "ignored_labels must be 'row' for dkd, whose soft term needs the label, got 'term'",
        ignored_labels="term",
        divergence="dkd",
    )
    refused(ValueError, "normalizer must be a number, a 0-d tensor or a pair of them", normalizer=(1.0, 2.0, 3.0))
    refused(ValueError, r"normalizer\[1\] must be a finite number > 0", normalizer=(1.0, 0.0))
    refused(TypeError, r"normalizer\[0\] must be a number or a 0-d tensor, got str", normalizer=("1", 2.0))
    refused(ValueError, "normalizer replaces the row count", normalizer=(1.0, 2.0), reduction="sum")
    refused(TypeError, "return_parts must be a bool, got int", return_parts=1)
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 9\) or ignore_index, got 9 in row 0"):
            mfd.distill_loss(
                student, teacher, labels.index_fill(0, torch.tensor(0), 9), hard_weight=1.0, ignored_labels="term",
                backend=backend,
            )  # fmt: skip
    with pytest.raises(ValueError, match="DistillationLoss: ignored_labels must be one of"):
        mfd.nn.DistillationLoss(ignored_labels="rows")
    with pytest.raises(ValueError, match="MFDLoss: absent_pool_weights must be one of 'infinite', 'renormalize'"):
        mfd.nn.MFDLoss(absent_pool_weights="zero")


# ------------------------------------------------------------------------------------------------------ mfd_loss


def multimodal(backend, rows=6, width=5, classes=4):
    rng = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=rng)

    labels = torch.randint(classes, (rows,), generator=rng)
    labels[[0, 3]] = -100
    return {
        "features": [draw(rows, width) for _ in range(3)],
        "query": draw(width),
        "head_weight": draw(classes, width),
        "head_bias": draw(classes),
        "teacher_logits": draw(rows, classes),
        "labels": labels,
        "teacher_features": draw(rows, width),
        "soft_weight": 0.6,
        "hard_weight": 0.5,
        "feature_weight": 0.3,
        "backend": backend,
    }


def call_mfd(arguments, **changes):
    arguments = {**arguments, **changes}
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("query", "head_weight", "head_bias")}
    result = mfd.mfd_loss(**{**arguments, **leaves})
    return result, torch.autograd.grad(result.loss.sum(), list(leaves.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_mfd_loss_is_that_of_all_rows_and_that_of_the_labelled(backend, reduction):
    arguments = multimodal(backend)
    found, grads = call_mfd(arguments, ignored_labels="term", reduction=reduction)
    teachers, of_teachers = call_mfd(arguments, labels=None, hard_weight=0.0, reduction=reduction)
    labels, of_labels = call_mfd(arguments, soft_weight=0.0, feature_weight=0.0, reduction=reduction)
    torch.testing.assert_close(found.loss, teachers.loss + labels.loss, **CLOSE)
    for grad, *parts in zip(grads, of_teachers, of_labels, strict=True):
        torch.testing.assert_close(grad, sum(parts), rtol=1e-4, atol=1e-5)
    for name, of in (("soft", teachers), ("feature", teachers), ("hard", labels)):
        torch.testing.assert_close(getattr(found, name), getattr(of, name), **CLOSE)
    assert_bitwise_equal(found.predictions, teachers.predictions)
    if reduction == "mean":
        pair = call_mfd(arguments, ignored_labels="term", normalizer=(6.0, torch.tensor(4.0)))
        torch.testing.assert_close(pair[0].loss, found.loss, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mfd_loss_without_a_teacher(backend):
    arguments = multimodal(backend) | {"soft_weight": 0.0, "divergence": "dkd"}
    with watched({"teacher": arguments["teacher_logits"]}):
        expected, grads = call_mfd(arguments)
    found, same = call_mfd(arguments, teacher_logits=None)
    for a, b in zip((*found, *same), (*expected, *grads), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_with_more_modalities_speaks_of_those_that_are_present(backend):
    arguments = multimodal(backend)
    present = torch.ones(6, 3, dtype=torch.bool)
    present[0, 2] = present[1, 0] = present[4, 1] = present[4, 2] = False
    present[5] = False
    weights = torch.softmax(torch.randn(6, 3, generator=torch.Generator().manual_seed(4)), -1)
    weights[1, 0] = math.nan  # of an absent modality
    call = {"present": present, "pool_weight": 0.7, "mask": torch.arange(6) != 3}
    kept = torch.where(present, weights, 0)
    shares = kept / kept.sum(-1, keepdim=True).clamp_min(1e-30)
    expected, grads = call_mfd(arguments, **call, teacher_pool_weights=shares)
    weights[3] = math.nan  # of a masked row
    found, same = call_mfd(arguments, **call, teacher_pool_weights=weights, absent_pool_weights="renormalize")
    assert bool(found.loss.isfinite())
    for a, b in zip((found.loss, *same), (expected.loss, *grads), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    infinite = mfd.mfd_loss(**arguments, **call, teacher_pool_weights=weights.nan_to_num(0.2))
    assert infinite.loss.item() == math.inf
    # The teacher's weights learn, too.
    leaf = weights.detach().requires_grad_()
    mfd.mfd_loss(**arguments, **call, teacher_pool_weights=leaf, absent_pool_weights="renormalize").loss.backward()
    assert bool(leaf.grad.isfinite().all())
    assert not leaf.grad[~present].any()
    assert not leaf.grad[3].any()
    assert bool(leaf.grad[1, 1:].any())
