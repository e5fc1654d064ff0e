"""Rows at the edges of the arithmetic: far teachers, mass that underflows, teachers of weight 0, overflow."""

import eager_divergences
import pytest
import torch
from op_db import BACKEND_FEATURES

import mfd_fast as mfd
from mfd_fast.testing import assert_close_to_float64, distill_inputs

INF = torch.inf


def gradients(student, teacher, labels=None, *, dtype=None, backend="reference", more=(), **options):
    """Loss per row and the gradients to student, teacher and the tensors of ``options`` named in ``more``."""
    student, teacher = (x.to(dtype or x.dtype).detach().requires_grad_() for x in (student, teacher))
    loss = mfd.distill_loss(student, teacher, labels, reduction="none", backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [student, teacher, *(options[name] for name in more)])]


def eager_gradients(student, teacher, divergence):
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    log_p, log_q = (torch.log_softmax(x, -1) for x in (teacher, student))
    loss = eager_divergences.divergence(divergence, log_p, log_q, None)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [student, teacher])]


@pytest.mark.parametrize("divergence", [mfd.SkewKL(0.5), mfd.SkewReverseKL(0.5)], ids=repr)
@pytest.mark.parametrize(("backend", "shape"), [("cpu", (400, 1000)), ("triton", (24, 100)), ("cuda", (48, 100))])
def test_the_slope_towards_a_far_distribution_keeps_its_digits(backend, shape, divergence):
    """p/m is small wherever q is large; 1 - p/m, which is 0 at p = q, would round it away."""
    sample = distill_inputs(shape)
    found = gradients(sample.student, sample.teacher, divergence=divergence, backend=backend)
    exact = gradients(sample.student, sample.teacher, divergence=divergence, dtype=torch.float64)
    eager = eager_gradients(sample.student, sample.teacher, divergence)
    for name, a, b, c in zip(("loss", "d student", "d teacher"), found, exact, eager, strict=True):
        assert_close_to_float64(a, b, c, f"{backend} {divergence} {name}")


@pytest.mark.parametrize("divergence", [mfd.JSD(0.01), mfd.JSD(0.9), mfd.SkewKL(0.9)], ids=repr)
@pytest.mark.parametrize(("backend", "rows"), [("cpu", 512), ("cuda", 128)])
def test_the_value_of_near_distributions_keeps_its_digits(backend, rows, divergence):
    """A rounding that all classes of a row share does not average out."""
    sample = distill_inputs((rows, 1000), distance="near")
    student, teacher = sample.student / 2, sample.teacher / 2
    found = gradients(student, teacher, divergence=divergence, backend=backend)[0]
    exact = gradients(student, teacher, divergence=divergence, dtype=torch.float64)[0]
    report = assert_close_to_float64(found, exact, eager_gradients(student, teacher, divergence)[0])
    assert report.rms_error < 0.6 * report.eager_rms_error


@pytest.mark.parametrize("divergence", [mfd.JSD(0.02), mfd.SkewKL(0.7), mfd.SkewReverseKL(0.1)], ids=repr)
@pytest.mark.parametrize("temperature", [20.0, 1000.0])
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_hot_distributions_keep_the_digits_of_the_reference(backend, temperature, divergence):
    """All of them are near each other; T² brings the loss back to size, and the rounding of p and q with it."""
    sample = distill_inputs((32, 21))
    options = {"divergence": divergence, "temperature": temperature}
    found, same, exact = (
        gradients(sample.student, sample.teacher, backend=b, dtype=dtype, **options)
        for b, dtype in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    )
    for a, b, c in zip(found, same, exact, strict=True):
        assert relative_error(a, c) < max(3 * relative_error(b, c), 5e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
def test_standardised_rows_far_from_zero_keep_the_digits_of_their_gradients(backend):
    """Rounding the mean shifts all standardised logits, which the gradient through the deviation would notice."""
    sample = distill_inputs((32, 21))
    standardize = mfd.LogitTransform(standardize=True)
    options = {"temperature": 2.0, "student_transform": standardize, "teacher_transform": standardize}
    found, exact = (
        gradients(sample.student + 300, sample.teacher + 300, dtype=dtype, backend=b, **options)
        for b, dtype in ((backend, torch.float32), ("reference", torch.float64))
    )
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a, b) < 2e-6


def relative_error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("divergence", [mfd.SkewKL(0.1), mfd.SkewReverseKL(0.3), mfd.JSD(0.2)], ids=repr)
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_equal_distributions_have_no_slope(backend, divergence):
    student = distill_inputs((3, 33)).student
    assert not any(bool(x.any()) for x in gradients(student, student, divergence=divergence, backend=backend))


@pytest.mark.parametrize("divergence", [mfd.DKD(), mfd.DKD(0.0, 2.0), mfd.NKD()], ids=repr)
@pytest.mark.parametrize("backend", BACKEND_FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_teacher_without_mass_beside_the_label_still_ranks_the_rest(backend, dtype, divergence):
    """The non-target log-sum-exp is finite where 1 - p_y is 0."""
    sample = distill_inputs((2, 7), dtype=dtype)
    teacher = sample.teacher.clone()
    teacher[0, 3] = 3e3
    labels = torch.tensor([3, 0])
    options = {"divergence": divergence, "temperature": 1.5}
    found = gradients(sample.student, teacher, labels, backend=backend, **options)
    exact = gradients(sample.student, teacher, labels, dtype=torch.float64, **options)
    u, v = (x.double()[0, [0, 1, 2, 4, 5, 6]] / 1.5 for x in (sample.student, teacher))
    rest = torch.softmax(u, -1) - torch.softmax(v, -1)
    factor = divergence.beta if isinstance(divergence, mfd.DKD) else divergence.gamma
    expected = 1.5 * factor * rest
    if isinstance(divergence, mfd.DKD):  # p_y = 1: the pair pulls on the others by 1 - q_y
        pull = 1 - torch.softmax(sample.student.double()[0] / 1.5, -1)[3]
        expected = expected + 1.5 * divergence.alpha * pull * torch.softmax(u, -1)
    else:
        expected = expected + torch.softmax(sample.student.double()[0], -1)[[0, 1, 2, 4, 5, 6]]
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    if backend == "reference" and dtype == torch.float32:  # which rounds log p, of 2000, to 1e-4
        near = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(exact[1][0, [0, 1, 2, 4, 5, 6]], expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **near)


@pytest.mark.parametrize("divergence", [mfd.DKD(), mfd.NKD()], ids=repr)
@pytest.mark.parametrize("backend", [b for b, has in BACKEND_FEATURES.items() if "topk" in has])
def test_a_sparse_teacher_without_mass_beside_the_label_still_ranks_the_rest(backend, divergence):
    sample = distill_inputs((2, 9))
    values = torch.tensor([[0.0, -800.0, -801.5, -799.0], [-0.5, -1.5, -2.5, -9.0]])
    indices = torch.tensor([[3, 1, 0, 7], [2, 3, 4, 8]])
    found = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        student = sample.student.to(dtype).requires_grad_()
        teacher = mfd.TopK(values.to(dtype), indices)
        loss = mfd.distill_loss(
            student, teacher, indices[:, 0], divergence=divergence, temperature=2.0, reduction="none", backend=name
        )
        found.append([loss.detach().double(), torch.autograd.grad(loss.sum(), student)[0].double()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


DIFFERENT = [
    mfd.ForwardKL(),
    mfd.JSD(0.3),
    mfd.SkewKL(0.2),
    mfd.SkewReverseKL(0.2),
    mfd.TVD(),
    mfd.AlphaBeta(1.5, 0.7),
    mfd.DKD(0.5, 2.0),
    mfd.NKD(),
]


@pytest.mark.parametrize("divergence", DIFFERENT, ids=repr)
@pytest.mark.parametrize("backend", [b for b, has in BACKEND_FEATURES.items() if "teachers" in has])
def test_the_gradient_of_a_weight_of_zero(backend, divergence):
    """The teacher without a say has its mass where the mixture has e^-150 of it, which float32 does not have."""
    sample = distill_inputs((1, 5), spread=1.0)
    first = torch.tensor([[0.0, 1.0, -150.0, 0.5, -1.0]])
    second = torch.tensor([[0.0, 1.0, 150.0, 0.5, 149.0]])
    labels = torch.tensor([1])
    found = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        weights = torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)
        student, one, two = (x.to(dtype) for x in (sample.student, first, second))
        loss = mfd.distill_loss(
            student, [one, two], labels, teacher_weights=weights, divergence=divergence, backend=name
        )
        found.append(torch.autograd.grad(loss, weights)[0].double())
    assert bool(found[1].any())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# A divergence, the label, its class or the classes beside it with a logit of the first teacher's and the second's.
BEYOND = [
    (mfd.ReverseKL(), 1, 2, -150.0, -140.0),
    (mfd.ReverseKL(), 1, 2, -900.0, -895.0),
    (mfd.AlphaBeta(0.5, 0.5), 1, 2, -200.0, -85.0),
    (mfd.AlphaBeta(0.3, 0.2), 1, 2, -150.0, -100.0),
    (mfd.AlphaBeta(0.7, 0.0), 1, 2, -400.0, -110.0),
    (mfd.AlphaBeta(0.0, 0.8), 1, 2, -150.0, -145.0),
    (mfd.AlphaBeta(1.5, 0.7), 1, 2, -150.0, 50.0),
    (mfd.AlphaBeta(-0.2, 0.9), 1, 2, -150.0, -170.0),
    (mfd.DKD(0.5, 2.0), 1, 1, 200.0, 190.0),
    (mfd.DKD(1.5, 0.0), 1, 1, 200.0, 20.0),
    (mfd.DKD(1.5, 2.0), 1, 1, -150.0, 50.0),
    (mfd.NKD(), 1, 1, 200.0, 190.0),
    (mfd.NKD(), 1, 1, 90.0, 80.0),
]


@pytest.mark.parametrize(("divergence", "label", "where", "logit", "other"), BEYOND, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("backend", [b for b, has in BACKEND_FEATURES.items() if "teachers" in has])
def test_teachers_whose_mixture_underflows(backend, share, divergence, label, where, logit, other):
    """dD/dp overflows there, what it comes to for a teacher does not, with a say (``share``) or without."""
    sample = distill_inputs((1, 5), spread=1.0)
    first = torch.tensor([[0.0, 1.0, -2.0, 0.5, -1.0]])
    second = torch.tensor([[1.0, 0.0, 1.5, -2.5, 0.0]])
    first[0, where], second[0, where] = logit, logit if share else other
    found = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        weights = torch.tensor([1 - share, share], dtype=dtype, requires_grad=True)
        student, *teachers = (x.to(dtype) for x in (sample.student, first, second))
        leaves = [weights, *(t.requires_grad_() for t in teachers)]
        loss = mfd.distill_loss(
            student, teachers, torch.tensor([label]), teacher_weights=weights, divergence=divergence, backend=name
        )
        found.append([g.double() for g in torch.autograd.grad(loss, leaves)])
    assert bool(share or found[1][0].any())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_powers_of_a_mixture_that_underflows_beyond_float64(backend):
    """dD/dp = 2 (p^(1/2) - q^(1/2)) of alpha = 1, beta = 1/2 is that of p = 0, though q/p is beyond float64."""
    student = distill_inputs((1, 5), spread=1.0).student
    first, second = torch.tensor([[0.0, 1.0, -2e3, 0.5, -1.0]]), torch.tensor([[1.0, 0.0, 50.0, -2.5, 0.0]])
    found = []
    for name, dtype, logit in ((backend, torch.float32, -2e3), ("reference", torch.float64, -2e2)):
        weights = torch.tensor([1.0, 0.0], dtype=dtype, requires_grad=True)
        teachers = [first.masked_fill(first < -100, logit).to(dtype), second.to(dtype)]
        divergence = mfd.AlphaBeta(1.0, 0.5)
        loss = mfd.distill_loss(
            student.to(dtype), teachers, teacher_weights=weights, divergence=divergence, backend=name
        )
        found.append(torch.autograd.grad(loss, weights)[0].double())
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_an_alpha_beta_divergence_that_overflows_is_infinite(backend):
    student, teacher = (
        torch.tensor([[0.0, 1e4, 3.0], [0.3, 0.1, 0.2]]),
        torch.tensor([[1e4, 0.0, 5.0], [0.1, 0.2, 0.3]]),
    )
    loss = mfd.distill_loss(student, teacher, divergence=mfd.AlphaBeta(2.0, -0.5), reduction="none", backend=backend)
    assert loss[0].item() == INF
    assert bool(loss[1].isfinite())


@pytest.mark.parametrize("divergence", [mfd.AlphaBeta(2.0, -0.5), mfd.AlphaBeta(-0.5, 2.0)], ids=repr)
@pytest.mark.parametrize("backend", BACKEND_FEATURES)
def test_a_power_that_overflows_beside_one_that_vanishes(backend, divergence):
    """q^β alone is infinite where p^α q^β, and the loss, are not."""
    rows = 40
    sample = distill_inputs((rows, 6), spread=120.0)
    found, exact = (
        gradients(
            sample.student,
            sample.teacher,
            divergence=divergence,
            dtype=dtype,
            backend=name,
            temperature=torch.full((rows,), 1.5, dtype=dtype, requires_grad=True),
            teacher_temperature=torch.full((rows,), 1.2, dtype=dtype, requires_grad=True),
            more=("temperature", "teacher_temperature"),
        )
        for name, dtype in ((backend, torch.float32), ("reference", torch.float64))
    )
    finite = torch.stack([x.float().reshape(rows, -1).isfinite().all(-1) for x in exact]).all(0)
    assert int(finite.sum()) > rows / 2
    scale = exact[0][finite].clamp(min=1.0)[:, None]
    for a, b, size in zip(found, exact, (1, 1, 1, 120, 120), strict=True):
        error = (a.double() - b).reshape(rows, -1)[finite].abs() / scale
        assert float(error.max()) <= 1e-4 * size
