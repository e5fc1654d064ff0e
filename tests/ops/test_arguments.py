"""Arguments as people have them: NumPy's numbers, classes in dimension 1, extreme temperatures, bad variables."""

import contextvars
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import mfd_fast as mfd
from mfd_fast.backends import cpu, environment
from mfd_fast.testing import assert_bitwise_equal

BACKENDS = ["cpu", "triton", "reference"]
STUDENT, TEACHER = torch.randn(4, 6), torch.randn(4, 6)
LABELS = torch.tensor([0, 1, 2, -1])
FEATURES = [torch.randn(4, 5), torch.randn(4, 5)]
QUERY, HEAD = torch.randn(5), torch.randn(6, 5)


# ------------------------------------------------------------------------------------------------ NumPy's numbers

CALLS = {
    "distill_loss": lambda f, i, backend: mfd.distill_loss(
        STUDENT.clone().requires_grad_(), TEACHER, LABELS, temperature=f(2.0), teacher_temperature=f(1.5),
        soft_weight=f(0.5), hard_weight=f(0.25), label_smoothing=f(0.125), ignore_index=i(-1), normalizer=f(3.0),
        student_transform=mfd.LogitTransform(scale=f(0.5), softcap=f(8.0), classes=i(5)),
        teacher_transform=mfd.LogitTransform(classes=i(5)), divergence=mfd.JSD(f(0.25)), backend=backend,
    ),
    "distill_terms": lambda f, i, backend: mfd.distill_terms(
        STUDENT, TEACHER, LABELS, temperature=f(2.0), label_smoothing=f(0.5), ignore_index=i(-1), backend=backend
    ).soft,
    "modal_pool": lambda f, i, backend: mfd.modal_pool(
        FEATURES, QUERY, temperature=f(0.5), scale=f(0.25), backend=backend
    ).pooled,
    "feature_loss": lambda f, i, backend: mfd.feature_loss(
        FEATURES, FEATURES[::-1], weight=[f(0.5), f(2.0)], backend=backend
    ),
    "mfd_loss": lambda f, i, backend: mfd.mfd_loss(
        FEATURES, QUERY, HEAD, None, TEACHER, LABELS, pool_temperature=f(0.5), pool_scale=f(0.25), temperature=f(2.0),
        soft_weight=f(0.5), hard_weight=f(0.25), feature_weight=f(0.5), teacher_features=FEATURES[0],
        ignore_index=i(-1), normalizer=f(3.0), backend=backend,
    ).loss,
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16], ids=lambda k: k.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_numpy_scalars_are_numbers(name, kind, backend):
    expected = CALLS[name](float, int, backend)
    assert_bitwise_equal(CALLS[name](kind, np.int64, backend).detach(), expected.detach())


def test_numpy_scalars_build_modules_and_schedules():
    f, i = np.float32, np.int32
    module = mfd.nn.DistillationLoss(temperature=f(2.0), hard_weight=f(0.5), ignore_index=i(-1))
    expected = mfd.distill_loss(STUDENT, TEACHER, LABELS, temperature=2.0, hard_weight=0.5, ignore_index=-1)
    assert_bitwise_equal(module(STUDENT, TEACHER, LABELS), expected)
    assert mfd.nn.ModalPool(i(5), i(2)).dim == 5
    assert mfd.nn.ModalityDropout(i(2), p=f(0.5)).modalities == 2
    assert float(mfd.schedules.Linear(f(4.0), f(2.0), steps=i(2)).step()) == 3.0
    assert mfd.schedules.UncertaintyWeighting(i(2), log_variance=f(0.0)).terms == 2
    with pytest.raises(TypeError, match="temperature must be a number"):
        mfd.distill_loss(STUDENT, TEACHER, temperature=np.bool_(True))


# ------------------------------------------------------------------------------------------- classes in dimension 1


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 3)])
def test_classes_in_dimension_1_are_refused_where_labels_or_mask_show_it(shape):
    student, labels = torch.randn(shape), torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    for argument, value in (("labels", labels), ("mask", labels == 0)):
        with pytest.raises(ValueError, match=f"distill_loss: {argument} of shape .* pass student.movedim"):
            mfd.distill_loss(student, student, **{argument: value})
    last = student.movedim(1, -1)
    loss = mfd.distill_loss(last, -last, labels, hard_weight=1.0)
    flat = last.reshape(-1, 5)
    assert_bitwise_equal(loss, mfd.distill_loss(flat, -flat, labels.flatten(), hard_weight=1.0))


# ----------------------------------------------------------------------------------------------------- temperatures

OPS = {
    "distill_loss": lambda t, d: mfd.distill_loss(STUDENT.to(d), TEACHER.to(d), temperature=t),
    "teacher's": lambda t, d: mfd.distill_loss(STUDENT.to(d), TEACHER.to(d), teacher_temperature=t),
    "modal_pool": lambda t, d: mfd.modal_pool([x.to(d) for x in FEATURES], temperature=t).pooled,
    "mfd_loss": lambda t, d: (
        mfd.mfd_loss([x.to(d) for x in FEATURES], QUERY.to(d), HEAD.to(d), None, TEACHER.to(d), pool_temperature=t).loss
    ),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-20, 1e20, 1e39, 1e300, 10**400])
def test_temperatures_that_the_arithmetic_cannot_square_are_refused(name, temperature):
    with pytest.raises(ValueError, match="emperature must be "):
        OPS[name](temperature, torch.float32)
    if temperature < 1e39:
        with pytest.raises(ValueError, match="emperature must be "):
            OPS[name](torch.tensor(temperature), torch.float32)
    if 1e-150 < temperature < 1e150:
        assert bool(OPS[name](temperature, torch.float64).isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [2.0**-63, 2.0**63])
def test_the_ends_of_the_range_are_finite(temperature, backend):
    student = STUDENT.clone().requires_grad_()
    loss = mfd.distill_loss(student, TEACHER, temperature=temperature, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    pooled = mfd.modal_pool(FEATURES, QUERY, temperature=temperature, backend=backend).pooled
    assert bool(torch.cat([loss[None], gradient.flatten(), pooled.flatten()]).isfinite().all())


# ------------------------------------------------------------------------------------------- scores that are all -inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_scores_that_are_all_minus_infinity_is_nan_and_alone(backend):
    scores = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf], [-torch.inf, 1.0], [0.5, 0.5]])
    pooled, weights = mfd.modal_pool(FEATURES, scores=scores, backend=backend)
    assert bool(pooled[0].isnan().all())
    assert bool(weights[0].isnan().all())
    torch.testing.assert_close(weights[1:], torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
    assert bool(pooled[1:].isfinite().all())
    absent = torch.tensor([[False, False]] + [[True, True]] * 3)
    pooled, weights = mfd.modal_pool(FEATURES, scores=scores, present=absent, backend=backend)
    assert not pooled[0].any()
    assert not weights[0].any()


# -------------------------------------------------------------------------------------- log-probabilities above 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positive_log_probabilities_are_refused(dtype):
    values, indices = STUDENT.topk(3)
    wrong = mfd.TopK(values.to(dtype) + 3.0, indices)
    with pytest.raises(ValueError, match=r"teacher.values must be log-probabilities <= 0, got .*values_are='logits'"):
        mfd.distill_loss(STUDENT, wrong)
    mask = torch.tensor([True, True, False, True])
    right = STUDENT.log_softmax(-1).topk(3).values.to(dtype)
    right[2] = 5.0  # a masked row is not looked at
    assert bool(mfd.distill_loss(STUDENT, mfd.TopK(right, indices), mask=mask).isfinite())
    certain = torch.tensor([[1e-6, -16.0]] * 4)  # log 1, rounded
    assert bool(mfd.distill_loss(STUDENT, mfd.TopK(certain, indices[:, :2])).isfinite())


# -------------------------------------------------------------------------------------- threads and the environment


def test_use_backend_belongs_to_its_context():
    def choice():
        return mfd.explain(mfd.distill_loss, STUDENT, TEACHER).backend

    def in_thread(function):
        found = []
        thread = threading.Thread(target=lambda: found.append(function()))
        thread.start()
        thread.join()
        return found[0]

    usual = choice()
    assert usual != "reference"
    with mfd.use_backend("reference"):
        assert choice() == "reference"
        assert in_thread(choice) == usual
        context = contextvars.copy_context()
        assert in_thread(lambda: context.run(choice)) == "reference"
    assert "Threads started" in mfd.use_backend.__doc__


USES = """
import torch
import mfd_fast as mfd
from mfd_fast import cli
print("env:", cli.main(["env"]))
print("bench:", cli.main(["bench", "distill_loss"]))
try:
    mfd.distill_loss(torch.zeros(2, 3), torch.zeros(2, 3))
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("name", "value", "need"),
    [
        ("MFD_FAST_CPU_ISA", "sse", "one of baseline, avx2, avx512, got 'sse'"),
        ("MFD_FAST_GRAD_POOL_MB", "lots", "a number of MiB >= 0, got 'lots'"),
        ("MFD_FAST_GRAD_POOL_MB", "-1", "a number of MiB >= 0, got '-1'"),
        ("MFD_FAST_BACKEND", "gpu", "one of cuda, triton, cpu, reference, got 'gpu'"),
    ],
)
def test_bad_variables_are_refused_by_name_and_shown(name, value, need):
    done = subprocess.run(
        [sys.executable, "-c", USES], env={**os.environ, name: value}, capture_output=True, text=True, check=True
    )
    shown, rest = done.stdout.split("env: 0\n")
    assert " ".join(f"{name} must be {need}".split()) in " ".join(shown.replace("│", " ").split())
    assert rest == f"bench: 2\nrefused: {name} must be {need}\n"
    assert done.stderr == f"mfd-fast: {name} must be {need}\n"


def test_the_pool_keeps_little_by_default_and_the_variable_sets_it(monkeypatch, capsys):
    assert environment.gradient_pool_bytes() == 256 * 2**20 or "MFD_FAST_GRAD_POOL_MB" in os.environ
    code = "from mfd_fast.backends import cpu; cpu.available(); print(cpu.buffer_pool_stats().limit)"
    plain = {k: v for k, v in os.environ.items() if k != "MFD_FAST_GRAD_POOL_MB"}
    for extra, limit in (({}, 256 * 2**20), ({"MFD_FAST_GRAD_POOL_MB": "1.5"}, 3 * 2**19)):
        done = subprocess.run(
            [sys.executable, "-c", code], env=plain | extra, capture_output=True, text=True, check=True
        )
        assert int(done.stdout) == limit
    assert cpu.available() is None


def test_every_variable_is_shown_also_when_it_is_not_set(monkeypatch):
    from mfd_fast import cli

    for variable in environment.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    facts = dict(cli.describe())
    for variable in environment.VARIABLES:
        assert facts[variable.name] == f"not set: {variable.unset}"
    monkeypatch.setenv("MFD_FAST_BACKEND", "reference")
    assert dict(cli.describe())["MFD_FAST_BACKEND"] == "reference"
