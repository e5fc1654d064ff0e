"""What the divergences promise beside accuracy: end points, identities, parameters, special values."""

import math
import pickle

import op_db_divergences as samples
import pytest
import torch
from harness import evaluate, on, reference64, to_float64
from op_db import BACKEND_FEATURES, RECORDS, samples_on

import mfd_fast as mfd
from mfd_fast import divergences
from mfd_fast.testing import assert_bitwise_equal, distill_inputs

INF, NAN = math.inf, math.nan
RECORD, TERMS = RECORDS["distill_loss"], RECORDS["distill_terms"]
ALL = {**samples.DIVERGENCES, "alpha_beta_limit": mfd.AlphaBeta(0.7, 0.0)}
#: (backend, name of the divergence) that has it.
HAVE = [(b, name) for b in RECORD.backends for name in ALL if samples.feature(name) in BACKEND_FEATURES[b]]


def made(shape=(5, 7), dtype=torch.float64, **options):
    both = distill_inputs(shape, dtype=dtype, **options)
    return {"student": both.student, "teacher": both.teacher, "labels": both.labels}


def soft(backend="reference", **arguments):
    return mfd.distill_terms(**arguments, backend=backend).soft


@pytest.mark.parametrize("backend", RECORD.backends)
@pytest.mark.parametrize("name", RECORD.samples())
def test_a_backend_has_what_the_table_says_and_refuses_the_rest(backend, name):
    call = RECORD.samples()[name]
    if name in samples_on(RECORD, backend):
        assert mfd.explain(RECORD.op, **call, backend=backend).backend == backend
    else:
        with pytest.raises(mfd.BackendError, match=f"distill_loss: backend '{backend}' cannot run .* kernel"):
            RECORD.op(**call, backend=backend)


def test_every_divergence_is_public_named_and_sampled():
    names = {**divergences.DIVERGENCES, "alpha_beta": mfd.AlphaBeta(0.5, 0.5)}
    assert {type(d) for d in names.values()} == set(divergences.Divergence.__subclasses__())
    assert set(samples.DIVERGENCES) == set(names)
    for name, divergence in names.items():
        assert divergence.name == name
        assert getattr(mfd, type(divergence).__name__) is type(divergence)
        assert pickle.loads(pickle.dumps(divergence)) == divergence
        assert divergences.divergence_from(name, divergence.parameters) == divergence
        assert len({divergence, type(divergence)(*divergence.parameters[: len(divergence.__match_args__)])}) == 1
    with pytest.raises(ValueError, match=r"divergence must be one of .*got str 'alpha_beta'"):
        mfd.distill_loss(torch.zeros(1, 2), torch.zeros(1, 2), divergence="alpha_beta")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: mfd.JSD(1.5), ValueError, r"JSD: beta must be in \[0, 1\], got 1.5"),
        (lambda: mfd.JSD(-0.1), ValueError, "JSD: beta"),
        (lambda: mfd.JSD(NAN), ValueError, "JSD: beta"),
        (lambda: mfd.JSD("0.5"), TypeError, "JSD: beta must be a number, got '0.5'"),
        (lambda: mfd.JSD(True), TypeError, "JSD: beta must be a number"),
        (lambda: mfd.SkewKL(1.0), ValueError, r"SkewKL: lam must be in \[0, 1\), got 1.0"),
        (lambda: mfd.SkewKL(-1e-9), ValueError, "SkewKL: lam"),
        (lambda: mfd.SkewReverseKL(1), ValueError, "SkewReverseKL: lam"),
        (lambda: mfd.AlphaBeta(INF, 1.0), ValueError, "AlphaBeta: alpha must be finite, got inf"),
        (lambda: mfd.AlphaBeta(1.0, NAN), ValueError, "AlphaBeta: beta must be finite"),
        (lambda: mfd.AlphaBeta(None, 1.0), TypeError, "AlphaBeta: alpha must be a number"),
        (lambda: mfd.DKD(alpha=-1.0), ValueError, "DKD: alpha must be finite and >= 0"),
        (lambda: mfd.DKD(beta=INF), ValueError, "DKD: beta must be finite and >= 0"),
        (lambda: mfd.NKD(gamma=-0.5), ValueError, "NKD: gamma must be finite and >= 0"),
        (lambda: mfd.NKD(torch.tensor(1.0)), TypeError, "NKD: gamma must be a number"),
    ],
)
def test_parameters_are_checked(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_labels_are_needed(name):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"distill_loss: labels must be given for (DKD|NKD)\("):
        mfd.distill_loss(x, x, divergence=name)


ENDS = [
    (mfd.JSD(0.0), mfd.ForwardKL()),
    (mfd.JSD(1), mfd.ReverseKL()),
    (mfd.SkewKL(0.0), mfd.ForwardKL()),
    (mfd.SkewReverseKL(0.0), mfd.ReverseKL()),
    (mfd.AlphaBeta(1.0, 0.0), mfd.ForwardKL()),
    (mfd.AlphaBeta(0, 1), mfd.ReverseKL()),
]


@pytest.mark.parametrize(("end", "same"), ENDS, ids=str)
def test_end_points_are_the_divergence_they_stand_for(end, same):
    assert end.canonical() == same
    one, other = (
        evaluate(RECORD, RECORD.op, {**made(), "divergence": d, "temperature": 2.0, "reduction": "none"})
        for d in (end, same)
    )
    for (name, a), (_, b) in zip(one.items(), other.items(), strict=True):
        assert_bitwise_equal(a, b, name)


NEIGHBOURS = [
    (mfd.SkewKL(1e-7), mfd.ForwardKL(), 1.0),
    (mfd.SkewReverseKL(1e-7), mfd.ReverseKL(), 1.0),
    (mfd.JSD(1e-7), mfd.ForwardKL(), 1e-7),
    (mfd.JSD(1 - 1e-7), mfd.ReverseKL(), 1e-7),
    (mfd.AlphaBeta(1.0, 1e-7), mfd.ForwardKL(), 1.0),
    (mfd.AlphaBeta(1e-7, 1.0), mfd.ReverseKL(), 1.0),
    (mfd.AlphaBeta(0.5, -0.5 + 1e-7), mfd.AlphaBeta(0.5, -0.5), 1.0),
    (mfd.AlphaBeta(1e-7, 1e-7), mfd.AlphaBeta(0.0, 0.0), 1.0),
    (mfd.AlphaBeta(0.7, 1e-7), mfd.AlphaBeta(0.7, 0.0), 1.0),
    (mfd.AlphaBeta(1e-7, 0.7), mfd.AlphaBeta(0.0, 0.7), 1.0),
]


@pytest.mark.parametrize(("near", "limit", "factor"), NEIGHBOURS, ids=str)
@pytest.mark.parametrize(("dtype", "room"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_neighbours_of_the_limits_are_close_to_them(near, limit, factor, dtype, room):
    """Nothing cancels at tiny parameters."""
    if near == mfd.AlphaBeta(1e-7, 1e-7) and dtype == torch.float32:
        near = mfd.AlphaBeta(1e-4, 1e-4)  # both exponents small: the error grows as 1/max(α, β)
        room = 2e-3
    arguments = {**made(dtype=dtype, spread=1.0), "reduction": "none"}
    one, other = (evaluate(RECORD, RECORD.op, {**arguments, "divergence": d}) for d in (near, limit))
    for (name, a), (_, b) in zip(one.items(), other.items(), strict=True):
        torch.testing.assert_close(a / factor, b, rtol=room, atol=room, msg=lambda m, n=name: f"{n}: {m}")


def test_identities():
    arguments = {**made(), "temperature": 2.0}

    def of(divergence, **changes):
        return soft(**{**arguments, **changes, "divergence": divergence})

    swapped = {"student": arguments["teacher"], "teacher": arguments["student"]}
    torch.testing.assert_close(of("reverse_kl"), of("forward_kl", **swapped))
    torch.testing.assert_close(of(mfd.JSD(0.3)), of(mfd.JSD(0.7), **swapped))
    torch.testing.assert_close(of("tvd"), of("tvd", **swapped))
    torch.testing.assert_close(of(mfd.AlphaBeta(0.3, 0.9)), of(mfd.AlphaBeta(0.9, 0.3), **swapped))
    q, p = (torch.softmax(arguments[k] / 2, -1) for k in ("student", "teacher"))
    torch.testing.assert_close(of(mfd.AlphaBeta(1.0, 1.0)), 2 * (p - q).square().sum(-1))
    torch.testing.assert_close(of(mfd.AlphaBeta(0.5, 0.5)), 8 * (p.sqrt() - q.sqrt()).square().sum(-1))
    # Zhao et al.: KL = KL of (label, rest) + (1 − p_y) KL over the rest.
    p_y = p.gather(-1, arguments["labels"][:, None]).squeeze(-1)
    torch.testing.assert_close(of(mfd.DKD(1.0, 0.0)) + (1 - p_y) * of(mfd.DKD(0.0, 1.0)), of("forward_kl"))
    two = made((4, 2))
    assert not bool(soft(**two, divergence=mfd.DKD(0.0, 5.0)).any())
    # NKD's first term has neither a temperature nor its square.
    first = of(mfd.NKD(0.0))
    assert_bitwise_equal(first, of(mfd.NKD(0.0), temperature=7.0))


@pytest.mark.parametrize(("backend", "name"), HAVE)
def test_equal_sides_are_at_distance_zero(backend, name):
    arguments = made((3, 9), dtype=torch.float32)
    arguments["teacher"] = arguments["student"]
    value = soft(backend, **arguments, divergence=ALL[name], temperature=3.0)
    if name in ("nkd", "cross_entropy"):
        assert bool((value > 0).all())
    else:
        torch.testing.assert_close(value, torch.zeros(3), rtol=0, atol=4e-6)


@pytest.mark.parametrize(("backend", "name"), HAVE)
def test_near_the_teacher_in_bfloat16(backend, name):
    """Relative error of the gradient <= 0.3 % and no negative value, where rivals are off by 3 to 23 %."""
    rows = 8 if backend == "triton" else 64
    made_ = made((rows, 256), dtype=torch.bfloat16, spread=2.0, distance="near")
    arguments = {**made_, "divergence": ALL[name], "temperature": 2.0}
    found = evaluate(RECORD, on(RECORD, backend), arguments, names=("student",))
    exact = reference64(RECORD, arguments, names=("student",))
    gap = (found.grads["student"].double() - exact.grads["student"]).norm() / exact.grads["student"].norm()
    assert gap <= 3e-3
    if name != "nkd":
        almost = {**arguments, "teacher": arguments["student"].float() * (1 + 1e-6)}
        assert bool((soft(backend, **arguments) >= 0).all())
        assert bool((soft(backend, **almost) >= 0).all())


def limits(divergence):
    """What a class contributes with p = 0, as factor and exponent of q, and with q = 0, as those of p."""
    name, (a, b) = divergence.name, divergence.parameters
    if name == "alpha_beta":
        return tuple((1 / (e * (a + b)) if e > 0 and a + b > 0 else INF, a + b) for e in (a, b))
    log_of_a, log_of_rest = (math.log(w) if w > 0 else NAN for w in (a, 1 - a))
    return {
        "forward_kl": ((0.0, 1), (INF, 1)),
        "cross_entropy": ((0.0, 1), (INF, 1)),
        "reverse_kl": ((INF, 1), (0.0, 1)),
        "jsd": ((-(1 - a) * log_of_rest, 1), (-a * log_of_a, 1)),
        "skew_kl": ((0.0, 1), (-log_of_a, 1)),
        "skew_reverse_kl": ((-log_of_a, 1), (0.0, 1)),
        "tvd": ((0.5, 1), (0.5, 1)),
    }[name]


POINTWISE = {
    **{k: v for k, v in ALL.items() if not v.needs_labels},
    "alpha_beta_negative": mfd.AlphaBeta(-0.4, 0.9),
    "alpha_beta_opposite": mfd.AlphaBeta(0.5, -0.5),
    "alpha_beta_log": mfd.AlphaBeta(0.0, 0.0),
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, n) for b in RECORD.backends for n in POINTWISE if samples.feature(n) in BACKEND_FEATURES[b]],
)
def test_classes_without_mass(backend, name):
    """Row 0: −inf on both sides; row 1: in the teacher; row 2: in the student."""
    divergence = POINTWISE[name]
    arguments = made((3, 6), dtype=torch.float32)
    arguments["student"][[0, 2], 3] = arguments["teacher"][[0, 1], 3] = -INF
    del arguments["labels"]
    call = {**arguments, "divergence": divergence, "temperature": 1.5, "scale_by_temperature": False}
    found = evaluate(TERMS, on(TERMS, backend), call, names=("student", "teacher"))
    value, kept = found.outputs["soft"], [0, 1, 2, 4, 5]
    q, p = (torch.softmax(arguments[k].double() / 1.5, -1) for k in ("student", "teacher"))
    # The same sum over the other classes, and the limit of the one without mass.
    f = oracle_terms(divergence, p[:, kept], q[:, kept])
    (of_q, q_power), (of_p, p_power) = limits(divergence)
    limit = [0.0, of_q * q[1, 3].item() ** q_power, of_p * p[2, 3].item() ** p_power]
    expected = f + torch.tensor(limit, dtype=torch.float64)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    for side, grad in found.grads.items():
        always = side == "student" and isinstance(divergence, (mfd.ForwardKL, mfd.CrossEntropy))
        assert bool(grad[value.isfinite() | always].isfinite().all()), side
        assert grad[0, 3] == 0, side


def oracle_terms(divergence, p, q):
    """Σ f over some classes, in float64, without the care that whole rows need."""
    name, (a, b) = divergence.name, divergence.parameters
    r = (p / q).log()
    if name == "alpha_beta":
        import numpy_oracle_divergences as oracle

        return torch.from_numpy(oracle.alpha_beta(p.numpy(), q.numpy(), a, b)[0])
    m = {"jsd": a * p + (1 - a) * q, "skew_kl": a * p + (1 - a) * q, "skew_reverse_kl": (1 - a) * p + a * q}.get(name)
    f = {
        "forward_kl": lambda: p * r,
        "cross_entropy": lambda: -p * q.log(),
        "reverse_kl": lambda: -q * r,
        "jsd": lambda: a * p * (p / m).log() + (1 - a) * q * (q / m).log(),
        "skew_kl": lambda: p * (p / m).log(),
        "skew_reverse_kl": lambda: q * (q / m).log(),
        "tvd": lambda: (p - q).abs() / 2,
    }[name]()
    return f.sum(-1)


@pytest.mark.parametrize(("backend", "name"), [c for c in HAVE if ALL[c[1]].needs_labels])
def test_classes_without_mass_of_the_divergences_with_labels(backend, name):
    arguments = made((7, 5), dtype=torch.float32)
    arguments["labels"] = torch.full((7,), 1)
    student, teacher = arguments["student"], arguments["teacher"]
    student[0, 3] = teacher[0, 3] = -INF  # on both sides
    teacher[1, 3] = -INF
    student[2, 3] = -INF
    teacher[3, 1] = -INF  # the label
    student[4, 1] = -INF
    teacher[5, [0, 2, 3, 4]] = -INF  # all mass at the label
    student[6, [0, 2, 3, 4]] = -INF
    call = {**arguments, "divergence": ALL[name], "temperature": 1.5}
    found = evaluate(TERMS, on(TERMS, backend), call, names=("student",))
    value = found.outputs["soft"]
    assert value.isposinf().tolist() == [False, False, True, False, True, False, True]
    assert not bool(value.isnan().any())
    assert bool(found.grads["student"].isfinite().all())
    assert found.grads["student"][0, 3] == 0
    exact = evaluate(TERMS, on(TERMS, "reference"), to_float64(call), names=("student",))
    torch.testing.assert_close(value.double(), exact.outputs["soft"], rtol=1e-5, atol=1e-6)
    # Infinite values have the formula's gradient too; without any other class (row 6) it is finite, which is all.
    grads = (found.grads["student"][:6].double(), exact.grads["student"][:6])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "name"), HAVE)
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bad_row_is_nan_and_alone(backend, name, bad, side):
    clean = {**made((4, 6), dtype=torch.float32), "divergence": ALL[name]}
    dirty = {**clean, side: clean[side].clone()}
    dirty[side][1, 2] = bad
    found, expected = (evaluate(TERMS, on(TERMS, backend), c, names=("student",)) for c in (dirty, clean))
    assert found.outputs["soft"].isnan().tolist() == [False, True, False, False]
    assert bool(found.grads["student"][1].isnan().all())
    others = [0, 2, 3]
    assert_bitwise_equal(found.outputs["soft"][others], expected.outputs["soft"][others])
    assert_bitwise_equal(found.grads["student"][others], expected.grads["student"][others])


@pytest.mark.parametrize(("backend", "name"), HAVE)
def test_one_class_and_no_rows(backend, name):
    for shape in ((3, 1), (0, 4)):
        call = {**made(shape, dtype=torch.float32), "divergence": ALL[name], "temperature": 2.0}
        for reduction in ("mean", "none"):
            result = evaluate(RECORD, on(RECORD, backend), {**call, "reduction": reduction})
            assert all(not bool(value.any()) for _, value in result.items()), shape


@pytest.mark.parametrize(("backend", "name"), HAVE)
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_extreme_logits_and_temperatures_stay_finite(backend, name, temperature):
    for spread in (1e-2, 1e4):
        call = {**made((3, 9), dtype=torch.float32, spread=1.0), "divergence": ALL[name], "temperature": temperature}
        for side in ("student", "teacher"):
            call[side] = (call[side] * spread).clamp(-1e4, 1e4)
        call["scale_by_temperature"] = temperature < 10  # T² would lift the rounding of a tiny D
        value = evaluate(TERMS, on(TERMS, backend), call, names=("student",))
        exact = reference64(TERMS, call, names=("student",))
        representable = exact.outputs["soft"].float().isfinite()
        torch.testing.assert_close(
            value.outputs["soft"].double()[representable], exact.outputs["soft"][representable], rtol=1e-3, atol=1e-3
        )
        assert bool(value.grads["student"][representable].isfinite().all())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_mfd_loss_takes_every_divergence(name, seed):
    """Its soft term is that of distill_loss on the logits of the head."""
    call = RECORDS["mfd_loss"].samples(dtype=torch.float64, seed=seed)["plain"]
    labels = torch.arange(6)
    out = mfd.mfd_loss(**call, labels=labels, divergence=ALL[name])
    pooled, _ = mfd.modal_pool(call["features"], call["query"])
    logits = pooled @ call["head_weight"].T + call["head_bias"]
    loss = mfd.distill_loss(logits, call["teacher_logits"], labels, divergence=ALL[name], temperature=2.0)
    torch.testing.assert_close(out.loss, loss)
