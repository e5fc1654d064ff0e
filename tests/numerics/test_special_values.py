"""NaN, infinities, rows that do not exist and other special values of the row losses, on every backend."""

import math

import pytest
import torch
from harness import BACKENDS, assert_obeys_rule, evaluate, on, reference64
from op_db import RECORDS

import mfd_fast as mfd
from mfd_fast.testing import assert_bitwise_equal, distill_inputs

INF, NAN = math.inf, math.nan
RECORD = RECORDS["distill_loss"]
TERMS = RECORDS["distill_terms"]
# The scalar loss with its gradient from the forward pass, and the road by recomputation.
ROADS = {"scalar": ("student",), "recompute": ("student", "teacher")}

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def sample(rows=4, classes=7, **options):
    made = distill_inputs((rows, classes), **options)
    return {
        "student": made.student,
        "teacher": made.teacher,
        "labels": made.labels,
        "temperature": 2.0,
        "hard_weight": 0.5,
    }


def run(backend, arguments, road="recompute"):
    return evaluate(RECORD, on(RECORD, backend), arguments, names=ROADS[road])


def rows_of(backend, arguments):
    return run(backend, {**arguments, "reduction": "none"})


def assert_zero(result):
    for name, value in result.items():
        assert not bool(value.any()), name
        assert not bool(value.isnan().any()), name


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("why", ["empty", "masked", "ignored", "both"])
def test_no_rows(backend, reduction, road, why):
    arguments = sample(rows=0 if why == "empty" else 3)
    if why == "masked":
        arguments["mask"] = torch.zeros(3, dtype=torch.bool)
    if why == "ignored":
        arguments["labels"] = torch.full((3,), -100)
    if why == "both":
        arguments["mask"] = torch.tensor([False, True, False])
        arguments["labels"] = torch.tensor([0, -100, 1])
    if why != "empty":
        arguments["student"][0, 0] = NAN
    result = run(backend, {**arguments, "reduction": reduction}, road)
    assert result.outputs["loss"].shape == ((len(arguments["student"]),) if reduction == "none" else ())
    assert_zero(result)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("why", ["mask", "ignore_index"])
def test_masked_row_has_no_effect(backend, road, value, reduction, why):
    clean = {**sample(), "weight": torch.tensor([1.0, 2.0, 3.0, 0.5]), "reduction": reduction}
    clean["temperature"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    if why == "mask":
        clean["mask"] = torch.tensor([True, False, True, True])
    else:
        clean.update(labels=torch.tensor([1, 9999, 0, 6]), ignore_index=9999)
    dirty = dict(clean)
    for name in ("student", "teacher", "weight", "temperature"):
        dirty[name] = clean[name].clone()
        dirty[name][1] = abs(value) if name == "temperature" else value
    expected, found = run(backend, clean, road), run(backend, dirty, road)
    for name, grad in found.grads.items():
        assert not bool(grad[1].any()), name
    for (name, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize("value", [NAN, INF, 0.0])
@pytest.mark.parametrize("why", ["mask", "ignore_index"])
def test_temperatures_and_teacher_weights_of_a_masked_row_are_not_read(backend, value, why):
    clean = {**sample(), "teacher_temperature": torch.tensor([1.0, 2.0, 0.5, 4.0])}
    clean["teacher"] = [clean["teacher"], clean["teacher"].flip(0)]
    if why == "mask":
        clean["mask"] = torch.tensor([True, False, True, True])
    else:
        clean["labels"] = torch.tensor([1, -100, 0, 6])
    clean["temperature"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    clean["teacher_weights"] = torch.tensor([[0.3, 0.7], [0.5, 0.5], [1.0, 0.0], [2.0, 1.0]])
    names = ("temperature", "teacher_temperature", "teacher_weights")
    results = []
    for dirty in (False, True):
        leaves = {name: clean[name].clone() for name in names}
        if dirty:
            for leaf in leaves.values():
                leaf[1] = value
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        loss = mfd.distill_loss(**{**clean, **leaves}, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, list(leaves.values()))))
    for name, a, b in zip(("loss", *names), *results, strict=True):
        assert_bitwise_equal(a, b, name)
        assert not bool(a.dim() and a[1].any()), name


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_masked_row_has_no_effect_on_terms(backend, value):
    clean = {k: v for k, v in sample().items() if k != "hard_weight"}
    clean["mask"] = torch.tensor([True, False, True, True])
    dirty = {**clean, "student": clean["student"].clone(), "teacher": clean["teacher"].clone()}
    dirty["student"][1] = dirty["teacher"][1] = value
    expected, found = (evaluate(TERMS, on(TERMS, backend), a) for a in (clean, dirty))
    for (name, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        assert_bitwise_equal(a, b, name)
        assert not bool(a[1].any()), name


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minus_infinity_on_both_sides_contributes_nothing(backend, road, dtype):
    arguments = sample(dtype=dtype)
    arguments["labels"] = torch.zeros(4, dtype=torch.int64)
    for side in ("student", "teacher"):
        arguments[side][:, 3] = -INF
    kept = {**arguments, **{s: arguments[s][:, [0, 1, 2, 4, 5, 6]] for s in ("student", "teacher")}}
    found, expected = run(backend, arguments, road), run(backend, kept, road)
    torch.testing.assert_close(found.outputs["loss"], expected.outputs["loss"])
    for name, grad in found.grads.items():
        assert not bool(grad[:, 3].any()), name
        torch.testing.assert_close(grad[:, [0, 1, 2, 4, 5, 6]], expected.grads[name])
    terms = mfd.distill_terms(arguments["student"], arguments["teacher"], backend=backend)
    assert all(bool(t.isfinite().all()) for t in terms if t is not None)


@pytest.mark.parametrize("road", ["scalar", "per_row"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_student_minus_infinity_where_the_teacher_has_mass(backend, road, reduction):
    """Forward KL is +inf; its gradient is still f·(q − p)/T, with q = 0 there."""
    arguments = {**sample(), "hard_weight": 0.0, "reduction": reduction}
    arguments["student"][1, 2] = -INF
    arguments["labels"][1] = 0
    temperature = torch.full((4,), 2.0) if road == "per_row" else 2.0
    found = evaluate(RECORD, on(RECORD, backend), {**arguments, "temperature": temperature}, names=("student",))
    loss, grad = found.outputs["loss"], found.grads["student"]
    if reduction == "none":
        assert loss.isposinf().tolist() == [False, True, False, False]
        assert not bool(loss.isnan().any())
    else:
        assert loss.item() == INF
    assert bool(grad.isfinite().all())
    up = grad_output_of(loss)
    q, p = (torch.softmax(arguments[s].double() / 2.0, -1) for s in ("student", "teacher"))
    torch.testing.assert_close(grad.double(), up * 2.0 * (q - p), rtol=1e-5, atol=1e-6)


def grad_output_of(loss):
    """The upstream gradient that ``evaluate`` sent into ``loss``."""
    leaf = loss.detach().requires_grad_()
    (up,) = evaluate(RECORD, lambda leaf: {"loss": leaf * 1.0}, {"leaf": leaf}, names=("leaf",)).grads.values()
    return up.double().reshape(-1, 1)


def test_label_column_of_minus_infinity_makes_the_hard_term_infinite(backend):
    arguments = {**sample(), "soft_weight": 0.0, "hard_weight": 1.0, "reduction": "none"}
    arguments["labels"] = torch.tensor([0, 1, 2, 3])
    arguments["student"][2, 2] = -INF
    found = evaluate(RECORD, on(RECORD, backend), arguments, names=("student",))
    assert found.outputs["loss"].isposinf().tolist() == [False, False, True, False]
    assert bool(found.grads["student"].isfinite().all())


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_full_smoothing_and_a_label_of_minus_infinity(backend, reduction):
    """Every class weighs 1/C, the label's too: +inf, with the gradient softmax(x) - 1/C."""
    arguments = {**sample(), "soft_weight": 0.0, "hard_weight": 1.0, "label_smoothing": 1.0, "reduction": reduction}
    arguments["student"][1, arguments["labels"][1]] = -INF
    found = evaluate(RECORD, on(RECORD, backend), arguments, names=("student",))
    loss, grad = found.outputs["loss"], found.grads["student"]
    assert loss.isposinf().tolist() == ([False, True, False, False] if reduction == "none" else True)
    expected = grad_output_of(loss) * (torch.softmax(arguments["student"].double(), -1) - 1 / 7)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("road", ROADS)
def test_teacher_minus_infinity_contributes_nothing(backend, road):
    arguments = sample()
    arguments["teacher"][1, 2] = -INF
    arguments["teacher"][2, 1:] = -INF  # all mass in one class
    found = run(backend, {**arguments, "reduction": "sum"}, road)
    exact = reference64(RECORD, {**arguments, "reduction": "sum"}, names=ROADS[road])
    torch.testing.assert_close(found.outputs["loss"].double(), exact.outputs["loss"], rtol=1e-5, atol=0)
    p = torch.softmax(arguments["teacher"].double() / 2, -1)
    u = torch.log_softmax(arguments["student"].double() / 2, -1)
    by_hand = 4 * (torch.special.xlogy(p, p) - p * u).sum()
    hard = torch.nn.functional.cross_entropy(arguments["student"].double(), arguments["labels"], reduction="sum")
    torch.testing.assert_close(found.outputs["loss"].double(), by_hand + 0.5 * hard, rtol=1e-5, atol=0)
    for name, grad in found.grads.items():
        assert bool(grad.isfinite().all()), name
        torch.testing.assert_close(grad.double(), exact.grads[name], rtol=1e-4, atol=1e-6)
    if road == "recompute":
        assert found.grads["teacher"][1, 2] == 0


def bad_row(case):
    side, kind = case
    arguments = sample()
    row = arguments[side][1]
    if kind == "only -inf":
        row[:] = -INF
    elif kind == "NaN beside -inf":
        row[:] = -INF
        row[4] = NAN
    else:
        row[4] = {"NaN": NAN, "+inf": INF}[kind]
    return arguments


BAD = [(side, kind) for side in ("student", "teacher") for kind in ("NaN", "+inf", "only -inf", "NaN beside -inf")]
BAD_IDS = [f"{side}-{kind}" for side, kind in BAD]


@pytest.mark.parametrize("case", BAD, ids=BAD_IDS)
@pytest.mark.parametrize("weight", [None, 0.0, 1.5])
def test_bad_row_is_nan_and_the_others_are_untouched(backend, case, weight):
    """A weight of 0 hides nothing: 0·NaN surfaces."""
    arguments = bad_row(case)
    clean = sample()
    if weight is not None:
        arguments["weight"] = clean["weight"] = torch.tensor([1.0, weight, 1.0, 1.0])
    found, expected = rows_of(backend, arguments), rows_of(backend, clean)
    assert found.outputs["loss"].isnan().tolist() == [False, True, False, False]
    for name, grad in found.grads.items():
        if weight != 0.0:
            assert bool(grad[1].isnan().all()), name
    others = [0, 2, 3]
    for (name, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        assert_bitwise_equal(a[others], b[others], name)


@pytest.mark.parametrize("case", BAD, ids=BAD_IDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("road", ROADS)
def test_bad_row_makes_the_scalar_nan(backend, case, reduction, road):
    found = run(backend, {**bad_row(case), "reduction": reduction}, road)
    assert math.isnan(found.outputs["loss"].item())
    for name, grad in found.grads.items():
        assert bool(grad[1].isnan().all()), name
        assert bool(grad[[0, 2, 3]].isfinite().all()), name


HIDING = [(7, mfd.DKD(0, 1.0)), (7, mfd.DKD(0, 0)), (1, mfd.DKD(0, 0)), (7, mfd.NKD(0.0)), (1, mfd.NKD())]


@pytest.mark.parametrize(("classes", "divergence"), HIDING, ids=str)
def test_a_part_of_weight_zero_does_not_hide_a_bad_row(backend, classes, divergence):
    """The label itself is bad, of which a part of weight 0 may be all that sees it; the last row is sound."""
    arguments = {**sample(rows=7, classes=classes), "divergence": divergence, "hard_weight": 0.0}
    label = arguments["labels"]
    for row, side in ((0, "student"), (3, "teacher")):
        arguments[side][row, label[row]] = NAN
        arguments[side][row + 1, label[row + 1]] = INF
        arguments[side][row + 2] = -INF
    per_row = {"temperature": torch.full((7,), 2.0), "teacher_temperature": torch.full((7,), 3.0)}
    names = ("student", "teacher", *per_row)
    found = evaluate(RECORD, on(RECORD, backend), {**arguments, **per_row, "reduction": "none"}, names=names)
    mean = evaluate(RECORD, on(RECORD, backend), arguments, names=("student",))
    assert math.isnan(mean.outputs["loss"].item())
    for name, value in (*found.items(), *mean.grads.items()):
        assert bool(value[:6].isnan().all()), name
        assert bool(value[6].isfinite().all()), name


@pytest.mark.parametrize("case", BAD, ids=BAD_IDS)
def test_bad_row_in_the_terms(backend, case):
    arguments = {k: v for k, v in bad_row(case).items() if k != "hard_weight"}
    terms = mfd.distill_terms(**arguments, backend=backend)
    side, kind = case
    assert terms.soft.isnan().tolist() == [False, True, False, False]
    own = terms.student_entropy if side == "student" else terms.teacher_entropy
    other = terms.teacher_entropy if side == "student" else terms.student_entropy
    assert own.isnan().tolist() == [False, True, False, False]
    assert bool(other.isfinite().all())
    assert terms.hard.isnan().tolist() == [False, side == "student", False, False]
    probability = terms.student_label_prob if side == "student" else terms.teacher_label_prob
    assert probability.isnan().tolist() == [False, True, False, False]
    if "NaN" in kind:
        assert not bool(terms.agreement[1])


def test_unused_columns_are_not_read(backend):
    arguments = {**sample(), "student_transform": mfd.LogitTransform(classes=7)}
    clean = run(backend, arguments)
    arguments["student"] = torch.cat([arguments["student"], torch.full((4, 3), NAN)], -1)
    found = run(backend, arguments)
    assert_bitwise_equal(found.outputs["loss"], clean.outputs["loss"])
    assert_bitwise_equal(found.grads["student"][:, :7], clean.grads["student"])
    assert not bool(found.grads["student"][:, 7:].any())


@pytest.mark.parametrize("road", ROADS)
def test_one_class(backend, road):
    arguments = {**sample(classes=1), "label_smoothing": 0.1}
    for reduction in ("mean", "none"):
        assert_zero(run(backend, {**arguments, "reduction": reduction}, road))
        for divergence in ("dkd", "nkd"):
            with_label = {**arguments, "reduction": reduction, "divergence": divergence, "hard_weight": 1.0}
            assert_zero(run(backend, with_label, road))
    terms = mfd.distill_terms(arguments["student"], arguments["teacher"], arguments["labels"], backend=backend)
    assert terms.student_label_prob.tolist() == terms.teacher_label_prob.tolist() == [1.0] * 4
    assert not bool(terms.student_entropy.any() or terms.teacher_entropy.any())
    assert bool(terms.agreement.all())


@pytest.mark.parametrize("temperature", [0, 0.0, -0.0, -1.0, NAN])
@pytest.mark.parametrize("argument", ["temperature", "teacher_temperature"])
def test_temperature_that_is_not_positive(backend, argument, temperature):
    with pytest.raises(ValueError, match=f"distill_loss: {argument} must be .* > 0"):
        RECORD.op(**{**sample(), argument: temperature}, backend=backend)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("spread", [1.0, 1e2, 1e4])
def test_extreme_logits_and_temperatures(backend, road, spread, temperature):
    """Finite everywhere, and no less accurate than float32 arithmetic on logits shifted by their maximum."""
    arguments = sample(spread=1.0)
    for side in ("student", "teacher"):
        logits = arguments[side] * spread
        arguments[side] = logits.clamp(-1e4, 1e4)
    arguments["temperature"] = temperature
    found = run(backend, {**arguments, "reduction": "none"}, road)
    exact = reference64(RECORD, {**arguments, "reduction": "none"}, names=ROADS[road])
    eager = evaluate(RECORD, shifted_eager, {**arguments, "reduction": "none"}, names=ROADS[road])
    assert all(bool(value.isfinite().all()) for _, value in found.items())
    assert_obeys_rule(found, exact, eager, f"{backend} {spread} {temperature}")


def shifted_eager(student, teacher, **options):
    """Eager divides before it subtracts; subtracting first is what keeps extreme temperatures accurate."""
    student, teacher = (x - x.detach().amax(-1, keepdim=True) for x in (student, teacher))
    return {"loss": RECORD.eager(student, teacher, **options)}


@pytest.mark.parametrize("road", ROADS)
def test_weight_zero_counts_in_the_mean(backend, road):
    arguments = sample()
    ones = run(backend, {**arguments, "weight": torch.tensor([1.0, 0.0, 1.0, 1.0])}, road)
    kept = {k: v[[0, 2, 3]] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    three = run(backend, kept, road)
    torch.testing.assert_close(ones.outputs["loss"], three.outputs["loss"] * 0.75)
    assert all(not bool(grad[1].any()) for grad in ones.grads.values())


@pytest.mark.parametrize("road", ROADS)
def test_python_zero_weights_compute_nothing(backend, road):
    """soft_weight=0.0: no NaN from the teacher; hard_weight=0.0: labels only say which rows count."""
    arguments = sample()
    arguments["teacher"][:] = NAN
    found = run(backend, {**arguments, "soft_weight": 0.0}, road)
    assert all(bool(value.isfinite().all()) for _, value in found.items())
    arguments = {**sample(), "hard_weight": 0.0, "labels": torch.tensor([0, -100, 1, 2])}
    counted = {**arguments, "labels": None, "mask": torch.tensor([True, False, True, True])}
    for (name, a), (_, b) in zip(
        run(backend, arguments, road).items(), run(backend, counted, road).items(), strict=True
    ):
        assert_bitwise_equal(a, b, name)
    tensor = {**sample(), "soft_weight": torch.tensor(0.0)}
    tensor["teacher"][1] = NAN
    assert math.isnan(run(backend, tensor, road).outputs["loss"].item())


@pytest.mark.rest
@pytest.mark.parametrize("shape", [(65537 + 2, 2), (3, 65537 + 2)])
def test_more_than_65535(backend, shape):
    """No 16-bit grid limit: more than 65535 rows, and a row of more than 65535 classes."""
    made = distill_inputs(shape)
    # A sum takes one launch of many programs instead of two, which counts where they are interpreted.
    reduction = "sum" if backend == "triton" else "none"
    call = {"student": made.student, "teacher": made.teacher, "reduction": reduction}
    found = run(backend, call, "scalar")
    exact = reference64(RECORD, call, names=("student",))
    for (name, a), (_, b) in zip(found.items(), exact.items(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, msg=name)


def test_offsets_beyond_32_bits(backend):
    """Two rows 2**31 elements apart in one storage; its untouched pages take no memory."""
    made = distill_inputs((2, 5), dtype=torch.bfloat16)
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided((2, 5), (2**31, 1))
    far.copy_(made.student)
    near = {"student": made.student, "teacher": made.teacher}
    found, expected = run(backend, {**near, "student": far}), run(backend, near)
    for (name, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize("divergence", [mfd.JSD(), mfd.SkewKL(), mfd.SkewReverseKL()], ids=lambda d: d.name)
def test_the_temperature_does_not_move_a_student_logit_of_minus_infinity(backend, divergence):
    """Divergences from a mixture stay finite there, and so does their gradient to the temperature."""
    gradients = []
    for name in (backend, "reference"):
        student = torch.tensor([[1.0, -torch.inf, 0.5]], requires_grad=True)
        temperature = torch.tensor(2.0, requires_grad=True)
        teacher = torch.tensor([[0.3, 0.2, 0.1]])
        loss = mfd.distill_loss(student, teacher, divergence=divergence, temperature=temperature, backend=name)
        gradients.append(torch.autograd.grad(loss, temperature)[0])
    assert bool(torch.isfinite(gradients[1]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("divergence", [mfd.NKD(0.0), mfd.DKD(1.0, 0.0)], ids=["nkd", "dkd"])
def test_a_part_of_weight_zero_has_no_gradient_where_it_is_infinite(backend, divergence):
    gradients = []
    for name in (backend, "reference"):
        student = torch.tensor([[1.0, -torch.inf, 0.5]], requires_grad=True)
        teacher = torch.tensor([[0.3, 0.2, 0.1]], requires_grad=True)
        temperature = torch.tensor(2.0, requires_grad=True)
        label = torch.tensor([0])
        loss = mfd.distill_loss(student, teacher, label, divergence=divergence, temperature=temperature, backend=name)
        gradients.append(torch.autograd.grad(loss, [teacher, temperature]))
    assert all(bool(torch.isfinite(g).all()) for g in gradients[1])
    torch.testing.assert_close(*gradients)
