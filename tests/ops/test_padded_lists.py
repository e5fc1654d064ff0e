"""TopK lists of different lengths, padded to one K: each row is that of its own short list, whatever pads it."""

import math

import pytest
import torch
from harness import named_tensors
from op_db import RECORDS
from op_db_divergences import DIVERGENCES
from test_cpu_topk import KINDS, refused

import mfd_fast as mfd
from mfd_fast.testing import assert_bitwise_equal, distill_inputs

BACKENDS = RECORDS["distill_loss"].backends
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def ragged(classes, k, values_are="logprobs", rows=5):
    """student, values, indices and mask; lists of K, 1, K/2, K − 1 and K of K candidates in no order; their labels."""
    both = distill_inputs((rows, classes), dtype=torch.float64, spread=1.0, seed=k)
    values, indices = torch.log_softmax(both.teacher, -1).topk(k, -1)
    if values_are == "logits":
        values = both.teacher.gather(-1, indices)
    lengths = torch.tensor([k, 1, max(k // 2, 1), max(k - 1, 1), k])
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    mask = (torch.arange(k) < lengths[:, None])[:, order]
    values, indices = values[:, order], indices[:, order]
    return both.student, values, indices, mask, torch.stack([i[m][0] for i, m in zip(indices, mask, strict=True)])


def spoilt(values, indices, mask):
    """What stands where a list is padded: NaN, infinities, classes out of range, again, or of another list."""
    many = len(values) * values.shape[-1]
    bad_values = torch.tensor([math.nan, -math.inf, math.inf, 5.0], dtype=values.dtype).repeat(many)[:many]
    bad_indices = torch.tensor([-1, 0, 10**12, 0, 1]).repeat(many)[:many]
    return (
        torch.where(mask, values, bad_values.reshape(values.shape)),
        torch.where(mask, indices, bad_indices.reshape(indices.shape)),
    )


@every_backend
@pytest.mark.parametrize(("tail", "values_are"), KINDS, ids=["-".join(kind) for kind in KINDS])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=str)
def test_a_padded_list_is_the_short_one(backend, tail, values_are, divergence):
    """Loss, and gradients to student, values and both temperatures; also where a row lists all classes."""
    for classes, k in ((9, 4), (5, 5)) if backend == "triton" else ((9, 4), (5, 5), (1300, 20)):
        if refused(divergence, tail, values_are, k, classes + 1):
            continue
        student, values, indices, mask, labels = ragged(classes, k, values_are)
        both = torch.linspace(0.7, 2.0, 5, dtype=torch.float64), torch.linspace(1.5, 0.9, 5, dtype=torch.float64)
        kind = {"tail": tail, "values_are": values_are}
        options = {"divergence": divergence, "hard_weight": 0.3, "label_smoothing": 0.1, "reduction": "none"}
        bad_values, bad_indices = spoilt(values, indices, mask)
        leaves = [t.clone().requires_grad_() for t in (student, bad_values, *both)]
        teacher = mfd.TopK(leaves[1], bad_indices, **kind, mask=mask)
        softened = {"temperature": leaves[2], "teacher_temperature": leaves[3]}
        found = mfd.distill_loss(leaves[0], teacher, labels, **softened, **options, backend=backend)
        own = [t.clone().requires_grad_() for t in (student, values, *both)]
        alone = []
        for r in range(5):
            x, y, t, u = (leaf[r : r + 1] for leaf in own)
            teacher = mfd.TopK(y[:, mask[r]], indices[r : r + 1, mask[r]], **kind)
            softened = {"temperature": t, "teacher_temperature": u}
            alone.append(mfd.distill_loss(x, teacher, labels[r : r + 1], **softened, **options, backend="reference"))
        expected, ups = torch.cat(alone), torch.linspace(1.0, 2.0, 5, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        grads = torch.autograd.grad((found * ups).sum(), leaves)
        exact = torch.autograd.grad((expected * ups).sum(), own, allow_unused=True, materialize_grads=True)
        for a, b in zip(grads, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert bool(grads[1][~mask].eq(0).all())


@every_backend
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_pads_a_list_changes_no_bit(backend, tail, dtype):
    """Loss with its gradient in one pass, the terms, by-products: the same bits for other paddings, in every dtype."""
    student, values, indices, mask, labels = ragged(40, 8)
    student, values = student.to(dtype), values.to(dtype)
    found = []
    for given in ((values, indices), spoilt(values, indices, mask)):
        teacher = mfd.TopK(given[0], given[1].to(torch.int64), tail=tail, mask=mask)
        leaf = student.clone().requires_grad_()
        loss = mfd.distill_loss(leaf, teacher, labels, hard_weight=0.5, backend=backend)
        terms = mfd.distill_terms(student, teacher, labels, temperature=2.0, backend=backend)
        found.append({"loss": loss.detach(), "grad": torch.autograd.grad(loss, leaf)[0], **terms._asdict()})
    for name, value in found[0].items():
        assert bool(value.isfinite().all()), name
        assert_bitwise_equal(value, found[1][name], name)


@every_backend
def test_a_row_without_candidates_is_all_rest(backend):
    """Of log-probabilities the rest has everything on both sides: 0 and no gradient; else there is no distribution."""
    student, values, indices, mask, _ = ragged(9, 4)
    mask[2] = False
    for tail, value in (("bucket", 0.0), ("zero", 0.0), ("renormalize", math.nan)):
        leaf, listed = student.clone().requires_grad_(), values.clone().requires_grad_()
        teacher = mfd.TopK(listed, indices, tail=tail, mask=mask)
        loss = mfd.distill_loss(leaf, teacher, reduction="none", backend=backend)
        torch.testing.assert_close(loss[2].detach(), torch.tensor(value).double(), equal_nan=True, rtol=0, atol=1e-12)
        of_student, of_values = torch.autograd.grad(loss[[0, 1, 2, 3, 4]].sum(), [leaf, listed])
        # Against a rest that the tail drops other divergences see the student's mass.
        for divergence in () if tail == "zero" else ("tvd", "jsd", mfd.AlphaBeta(0.6, 0.3), "cross_entropy"):
            options = {"divergence": divergence, "reduction": "none", "backend": backend}
            other = mfd.distill_loss(student, teacher, **options)[2].detach()
            torch.testing.assert_close(other, torch.tensor(value).double(), equal_nan=True, rtol=0, atol=1e-12)
        others = [0, 1, 3, 4]
        assert bool(loss[others].isfinite().all() and of_student[others].isfinite().all())
        if tail != "renormalize":
            torch.testing.assert_close(of_student[2], torch.zeros(9).double(), rtol=0, atol=1e-12)
            assert bool(of_values[2].eq(0).all())
            terms = mfd.distill_terms(student, teacher, backend=backend)
            assert not terms.agreement[2]
            torch.testing.assert_close(terms.teacher_entropy[2], torch.tensor(0.0).double())


@every_backend
def test_masked_rows_of_padded_lists_reach_nothing(backend):
    """NaN and nonsense in rows that do not exist, with whole lists padded among them; a learned temperature."""
    student, values, indices, mask, labels = ragged(9, 4)
    exists = torch.tensor([True, False, True, False, True])
    mask[1] = False
    found = []
    for by in (0.0, math.nan):
        leaves = [torch.where(exists[:, None], t, by).requires_grad_() for t in (student, values)]
        temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        teacher = mfd.TopK(leaves[1], torch.where(exists[:, None], indices, 10**9), mask=mask, tail="renormalize")
        options = {"mask": exists, "temperature": temperature, "divergence": "reverse_kl", "hard_weight": 0.5}
        loss = mfd.distill_loss(leaves[0], teacher, labels, **options, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, [*leaves, temperature])))
    for a, b in zip(*found, strict=True):
        assert bool(a.isfinite().all())
        assert_bitwise_equal(a, b)


@every_backend
def test_second_order_and_chunked_heads_know_the_mask(backend):
    student, values, indices, mask, labels = ragged(9, 4)
    leaf = student.clone().requires_grad_()

    def gradient(teacher, rows=slice(None), of=backend):
        loss = mfd.distill_loss(leaf[rows], teacher, labels[rows], temperature=2.0, reduction="sum", backend=of)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    found = gradient(mfd.TopK(*spoilt(values, indices, mask), mask=mask))
    alone = sum(
        gradient(mfd.TopK(values[[r]][:, mask[r]], indices[[r]][:, mask[r]]), slice(r, r + 1), "reference")
        for r in range(5)
    )
    torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)
    if backend == "cuda":
        return
    hidden, weight = torch.eye(5, dtype=torch.float64), student.T.contiguous()
    options = {"divergence": "cross_entropy", "reduction": "none"}
    teacher = mfd.TopK(*spoilt(values, indices, mask), mask=mask)
    fused = mfd.linear_distill_loss(hidden, weight, teacher, None, **options, backend=backend).loss
    torch.testing.assert_close(fused, mfd.distill_loss(student, teacher, **options, backend=backend))


def test_errors_of_padded_lists():
    student, values, indices, mask, labels = ragged(9, 4)
    with pytest.raises(TypeError, match=r"TopK: mask must be None or a dense bool tensor, got torch.int64"):
        mfd.TopK(values, indices, mask=mask.long())
    with pytest.raises(ValueError, match=r"TopK: mask must be of shape \[5, 4\] \(that of values\), got \[5, 3\]"):
        mfd.TopK(values, indices, mask=mask[:, :3])
    unmasked = mfd.TopK(values.masked_fill(~mask, -math.inf), indices.masked_fill(~mask, -1))
    with pytest.raises(ValueError, match=r"got -1 in row 1; candidates that only pad the list are told by TopK\(mask"):
        mfd.distill_loss(student, unmasked)
    repeated = mfd.TopK(values.masked_fill(~mask, -math.inf), indices[:, :1].expand(-1, 4))
    with pytest.raises(ValueError, match=r"twice in row 0; candidates that only pad the list are told by TopK\(mask"):
        mfd.distill_loss(student, repeated)
    twice = indices.clone()
    twice[4, 2] = twice[4, 3]
    with pytest.raises(ValueError, match=f"must differ within a row, got {int(twice[4, 3])} twice in row 4"):
        mfd.distill_loss(student, mfd.TopK(values, twice, mask=mask))
    positive = values.clone()
    positive[~mask] = 7.0
    mfd.distill_loss(student, mfd.TopK(positive, indices, mask=mask))
    positive[3, 0] = 7.0
    assert mask[3, 0]
    with pytest.raises(ValueError, match=r"teacher.values must be log-probabilities <= 0, got 7 in row 3"):
        mfd.distill_loss(student, mfd.TopK(positive, indices, mask=mask))
    hidden = mask.clone()
    hidden[2] = indices[2] != labels[2]
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"dkd needs the label among teacher.indices, got label .* in row 2"):
            mfd.distill_loss(student, mfd.TopK(values, indices, mask=hidden), labels, divergence="dkd", backend=backend)
    with pytest.raises(ValueError, match=r"teacher.mask must be on cpu"):
        mfd.distill_loss(student, mfd.TopK(values, indices, mask=mask.to("meta")))


def test_explain_and_modules_take_padded_lists():
    student, values, indices, mask, labels = ragged(9, 4)
    teacher = mfd.TopK(values, indices, mask=mask)
    assert set(named_tensors({"teacher": teacher})) == {"teacher.values", "teacher.indices", "teacher.mask"}
    for divergence in ("forward_kl", "cross_entropy"):
        choice = mfd.explain(mfd.distill_loss, student, teacher, labels, divergence=divergence)
        assert choice.backend == "cpu", choice
        loss = mfd.nn.DistillationLoss(divergence=divergence)(student, teacher)
        torch.testing.assert_close(loss, mfd.distill_loss(student, teacher, divergence=divergence, backend="reference"))
