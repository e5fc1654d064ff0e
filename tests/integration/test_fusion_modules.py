"""The fusion modules: their functions against eager twins, absent modalities, gradients, compilation, errors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fusion_modules import (
    CLOSE,
    COMPILED,
    MODULES,
    OUT,
    STATES,
    WIDTHS,
    LinearAttentionFusion,
    call,
    inputs,
    low_rank,
    made,
    projected_then_stacked,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import mfd_fast as mfd
from mfd_fast.nn.fusion import weighted_bias
from mfd_fast.testing import assert_bitwise_equal, assert_close_to_float64

# ------------------------------------------------------------------------------------------------ their functions


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("modal")])
@pytest.mark.parametrize("masked", [False, True])
def test_modal_fusion_is_the_stacked_projections(name, masked):
    module = made(name, torch.float64)
    features, present = inputs(module, 8, dtype=torch.float64)
    features = [x.requires_grad_() for x in features]
    present[1, 0] = True  # eager's softmax of nothing is NaN
    present = present if masked else None
    clean = features if present is None else [torch.where(present[:, m, None], x, 0) for m, x in enumerate(features)]
    out = module(features, present)
    pooled, weights = projected_then_stacked(module, clean, present, module.temperature)
    torch.testing.assert_close(out.pooled, pooled)
    torch.testing.assert_close(out.weights, weights)
    leaves = [*features, *module.parameters()]
    up = torch.randn(8, OUT, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    found, expected = (torch.autograd.grad(r, leaves, up, allow_unused=True) for r in (tuple(out), (pooled, weights)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fold", [True, False])
def test_linear_scoring_is_torchmultimodals_attention_fusion(fold):
    module = mfd.nn.ModalFusion(WIDTHS, OUT, fold=fold, dtype=torch.float64)
    twin = LinearAttentionFusion(module)
    features, _ = inputs(module, 9, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in features]
    found, expected = module(leaves).pooled, twin(leaves)
    torch.testing.assert_close(found, expected)
    up = torch.randn_like(expected)
    mine = torch.autograd.grad(found, [*leaves, module.weight, module.bias], up)
    theirs = torch.autograd.grad(expected, [*leaves, *twin.projections.parameters()], up)
    for a, b in zip(mine[:3], theirs, strict=False):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(mine[3], torch.cat(theirs[3::2], 1))
    torch.testing.assert_close(mine[4], torch.stack(theirs[4::2]))


@pytest.mark.parametrize(("out", "form"), [(5, "_projected"), (6, "_folded")])
def test_fold_follows_the_widths(out, form, monkeypatch):
    """12 input columns against 2·O."""
    other = {"_projected": "_folded", "_folded": "_projected"}[form]
    monkeypatch.delattr(mfd.nn.ModalFusion, other)
    features = [torch.randn(3, 8), torch.randn(3, 4)]
    assert mfd.nn.ModalFusion([8, 4], out)(features).pooled.shape == (3, out)
    with pytest.raises(AttributeError, match=other):
        mfd.nn.ModalFusion([8, 4], out, fold=form == "_projected")(features)


def test_equal_widths_may_come_as_one_tensor():
    features = torch.randn(4, 3, 6)
    for module in (mfd.nn.ModalFusion([6] * 3, OUT), mfd.nn.LowRankFusion([6] * 3, OUT, 2)):
        whole, parts = (call(module, x)[0].detach() for x in (features, list(features.unbind(-2))))
        assert_bitwise_equal(whole, parts)


def test_modules_work_on_the_meta_device():
    for name in MODULES:
        module = MODULES[name](device="meta", dtype=torch.float32)
        features, present = inputs(module, 4)
        fused, _ = call(module, [x.to("meta") for x in features], present.to("meta"))
        assert fused.device.type == "meta"


def test_temperature_of_the_call_and_per_row():
    module = made("modal linear True")
    features, _ = inputs(module, 4)
    rows = torch.tensor([0.5, 1.0, 2.0, 4.0])
    for fold in (True, False):
        module.fold = fold
        whole = module(features, temperature=rows)
        for i in range(4):
            one = module([x[i] for x in features], temperature=rows[i])
            torch.testing.assert_close(whole.pooled[i], one.pooled, **CLOSE)
            torch.testing.assert_close(whole.weights[i], one.weights, **CLOSE)


def test_gates_by_hand():
    x, h = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    tanh = made("tanh", torch.float64)
    torch.testing.assert_close(tanh(x, x.flip(0)), x + torch.tanh(tanh.gate) * x.flip(0))
    sigmoid = made("sigmoid", torch.float64)
    torch.testing.assert_close(sigmoid(x, h), torch.sigmoid(sigmoid.gate(x)) * sigmoid.value(h))
    gmu = made("gmu", torch.float64)
    z = torch.sigmoid(gmu.gate(torch.cat([x, h], -1)))
    torch.testing.assert_close(gmu(x, h), z * torch.tanh(gmu.x_value(x)) + (1 - z) * torch.tanh(gmu.h_value(h)))
    film = made("film", torch.float64)
    gamma, beta = film.film(h).split(6, -1)
    torch.testing.assert_close(film(x, h), gamma * x + beta)


def test_gates_start_open_or_closed_as_documented():
    x, h = torch.randn(2, 6), torch.randn(2, 6)
    assert_bitwise_equal(mfd.nn.GatedFusion(6)(x, h).detach(), x)
    film = mfd.nn.GatedFusion(6, kind="film")
    assert_bitwise_equal(film.film.bias.detach(), torch.cat([torch.ones(6), torch.zeros(6)]))


def test_what_is_left_when_one_is_absent():
    x, h = torch.randn(4, 6), torch.randn(4, 4)
    present = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    zero = torch.zeros(5)
    sigmoid = made("sigmoid")
    expected = [sigmoid(x[0], h[0]), zero, sigmoid.value(h[2]), zero]
    torch.testing.assert_close(sigmoid(x, h, present), torch.stack(expected), **CLOSE)
    gmu = made("gmu")
    expected = [gmu(x[0], h[0]), torch.tanh(gmu.x_value(x[1])), torch.tanh(gmu.h_value(h[2])), zero]
    torch.testing.assert_close(gmu(x, h, present), torch.stack(expected), **CLOSE)
    film = made("film")
    expected = [film(x[0], h[0]), x[1], film.film(h[2])[6:], torch.zeros(6)]
    torch.testing.assert_close(film(x, h, present), torch.stack(expected), **CLOSE)
    tanh, other = made("tanh"), x.flip(0)
    expected = [tanh(x[0], other[0]), x[1], torch.tanh(tanh.gate) * other[2], torch.zeros(6)]
    torch.testing.assert_close(tanh(x, other, present), torch.stack(expected), **CLOSE)


def test_low_rank_is_the_papers_formula_and_the_tensor_it_factorises():
    module = made("low rank", torch.float64)
    features, present = inputs(module, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(module(features), low_rank(module, features))
    clean = [x * present[..., m, None] for m, x in enumerate(features)]
    torch.testing.assert_close(module(features, present), low_rank(module, clean))
    # The full weight tensor of Tensor Fusion, W[o, i, j, k] = sum_r w_r F_1 F_2 F_3, applied to the outer product.
    full = torch.einsum("r,iro,jro,kro->oijk", module.rank_weight, *module.factors)
    padded = [torch.cat([torch.ones_like(x[..., :1]), x], -1) for x in features]
    expected = torch.einsum("oijk,...i,...j,...k->...o", full, *padded) + module.bias
    torch.testing.assert_close(module(features), expected)


def test_low_rank_factors_are_parameters_and_learn():
    module = made("low rank")
    features, _ = inputs(module, 5)
    module(features).square().sum().backward()
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        **{f"factors.{m}": (d + 1, 3, OUT) for m, d in enumerate(WIDTHS)},
        "rank_weight": (3,),
        "bias": (OUT,),
    }
    assert all(bool(p.grad.any()) for p in module.parameters())


def test_low_rank_gradient_is_exact_where_a_factor_is_zero():
    module = made("low rank", torch.float64)
    with torch.no_grad():
        module.factors[1].zero_()
    features, _ = inputs(module, 3, dtype=torch.float64)
    up = torch.randn(3, OUT, dtype=torch.float64)
    module(features).backward(up)
    z = [
        torch.einsum("bd,dro->bro", F.pad(x, (1, 0), value=1.0), f)
        for x, f in zip(features, module.factors, strict=True)
    ]
    left_out = z[0] * z[2] * module.rank_weight[:, None] * up[:, None]
    expected = torch.einsum("bd,bro->dro", F.pad(features[1], (1, 0), value=1.0), left_out)
    torch.testing.assert_close(module.factors[1].grad, expected)
    assert not module.factors[0].grad.any()


def test_low_rank_keeps_no_modality_axis():
    module = mfd.nn.LowRankFusion([16] * 4, 8, 5)
    rows, kept = 64, []
    features = [torch.randn(rows, 16) for _ in range(4)]

    def pack(tensor):
        if tensor.numel() >= rows * 5 * 8:
            kept.append(tensor.numel() // (rows * 5 * 8))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(features)
    assert set(kept) == {1}
    assert len(kept) == 2 * 4 - 2  # each of the M - 1 products keeps its two sides


# --------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_fusion_modules(name, masked):
    module = made(name, torch.float64)
    features, present = inputs(module, 4, dtype=torch.float64)
    names = [n for n, _ in module.named_parameters()]
    values = [*features, *module.parameters()]

    def function(*tensors):
        n = len(features)
        form = isinstance(module, mfd.nn.GatedFusion)
        arguments = tuple(tensors[:n]) if form else (list(tensors[:n]),)
        state = dict(zip(names, tensors[n:], strict=True))
        out = torch.func.functional_call(module, state, (*arguments, present if masked else None))
        return tuple(out) if isinstance(out, tuple) else out

    leaves = [v.detach().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", MODULES)
def test_absent_modalities_have_no_effect(name):
    module = made(name)
    features, present = inputs(module, 12)
    results = []
    for value in (torch.nan, torch.inf, 3.0):
        xs = [torch.where(present[:, m, None], x, value).requires_grad_() for m, x in enumerate(features)]
        fused, weights = call(module, xs, present)
        module.zero_grad()
        (fused.square().sum() + (0 if weights is None else weights.square().sum())).backward()
        grads = [x.grad for x in xs] + [p.grad for p in module.parameters()]
        results.append([t.detach().clone() for t in (fused, *grads)])
        for m, x in enumerate(xs):
            assert not x.grad[~present[:, m]].any()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bitwise_equal(a, b)
    assert all(bool(t.isfinite().all()) for t in results[0])


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("modal") or "film" in n or n == "gmu"])
def test_nothing_present_gives_zero(name):
    module = made(name)
    features, _ = inputs(module, 3)
    present = torch.zeros(3, len(features), dtype=torch.bool)
    xs = [torch.full_like(x, torch.nan).requires_grad_() for x in features]
    fused, weights = call(module, xs, present)
    assert not fused.any()
    assert weights is None or not weights.any()
    fused.sum().backward()
    assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODULES)
def test_any_leading_dimensions(name):
    module = made(name)
    features, present = inputs(module, 2, 3)
    whole, weights = call(module, features, present)
    assert whole.shape[:-1] == (2, 3)
    for i in range(2):
        for j in range(3):
            one, share = call(module, [x[i, j] for x in features], present[i, j])
            torch.testing.assert_close(one, whole[i, j], **CLOSE)
            if weights is not None:
                torch.testing.assert_close(share, weights[i, j], **CLOSE)
    empty, _ = call(module, [x[:0] for x in features], present[:0])
    assert empty.shape == (0, 3, whole.shape[-1])
    turned, _ = call(module, [x.transpose(0, 1) for x in features], present.transpose(0, 1))
    torch.testing.assert_close(turned.transpose(0, 1), whole, **CLOSE)
    repeated = [x[:1].expand(4, *x.shape[1:]) for x in features]
    torch.testing.assert_close(call(module, repeated)[0][3], call(module, features)[0][0], **CLOSE)


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_state(name):
    module = made(name)
    features, present = inputs(module, 4)
    expected = call(module, features, present)[0].detach()
    fresh = MODULES[name](dtype=torch.float32)
    fresh.load_state_dict(module.state_dict())
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), fresh):
        assert_bitwise_equal(call(twin, features, present)[0].detach(), expected)
    if name in STATES:
        assert set(module.state_dict()) == STATES[name]
    assert "features=" in repr(module)
    assert sum(p.numel() for p in MODULES[name](device="meta", dtype=torch.float16).parameters()) > 0


@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_is_no_less_accurate_than_eager(name):
    for seed in range(3):
        module = made(name, torch.bfloat16, seed)
        exact = copy.deepcopy(module).double()
        features, _ = inputs(module, 64, dtype=torch.bfloat16, seed=seed)
        doubles = [x.double() for x in features]
        if name.startswith("modal"):
            eager = projected_then_stacked(module, features, temperature=module.temperature)[0]
            reference = projected_then_stacked(exact, doubles, temperature=module.temperature)[0]
            assert module(features).weights.dtype == torch.float32
        elif name.startswith("low"):
            eager, reference = low_rank(module, features), low_rank(exact, doubles)
        else:  # a gate is eager already: it must only keep its dtype
            assert call(module, features)[0].dtype == torch.bfloat16
            continue
        found = call(module, features)[0]
        assert found.dtype == torch.bfloat16
        assert_close_to_float64(found.detach(), reference.detach(), eager.detach(), name)


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name):
    module = made(name)
    features, present = inputs(module, 16)
    exact = call(module, features, present)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = call(module, features, present)[0]
        mixed = call(module, [x.bfloat16() for x in features], present)[0]
    for result in (found, mixed):
        torch.testing.assert_close(result.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    module.zero_grad()
    found.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole_and_once(name):
    torch._dynamo.reset()
    module = made(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda xs, present: call(module, xs, present), fullgraph=True, dynamic=True, backend=counter
    )
    counts = []
    for rows in (9, 8):  # no size is one of the widths, which would tie it to them
        features, present = inputs(module, rows)
        grads = []
        for function in (compiled, lambda xs, p: call(module, xs, p)):
            leaves = [x.clone().requires_grad_() for x in features]
            fused, _ = function(leaves, present)
            grads.append((fused, *torch.autograd.grad(fused.square().sum(), [*leaves, *module.parameters()])))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0


def test_scheduled_temperature_never_recompiles():
    torch._dynamo.reset()
    schedule = mfd.schedules.Linear(4.0, 0.5, steps=4)
    module = mfd.nn.ModalFusion(WIDTHS, OUT, temperature=schedule.value)
    features, _ = inputs(module, 5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    seen = set()
    for _ in range(5):
        out = compiled(features)
        expected = module(features, temperature=float(schedule))
        torch.testing.assert_close(out.weights, expected.weights, **CLOSE)
        seen.add(round(float(out.weights.detach().max()), 6))
        schedule.step()
    assert counter.frame_count == 1
    assert len(seen) == 5


# -------------------------------------------------------------------------------------------------------- errors

X, H = torch.zeros(2, 6), torch.zeros(2, 4)
ERRORS = [
    (lambda: mfd.nn.ModalFusion([], 3), ValueError, "ModalFusion: in_features must be at least one width"),
    (lambda: mfd.nn.ModalFusion([4, 0], 3), ValueError, r"in_features\[1\] must be at least 1, got int 0"),
    (lambda: mfd.nn.ModalFusion(4, 3), TypeError, "in_features must be a sequence of widths"),
    (lambda: mfd.nn.ModalFusion([4], 3, scoring="dot"), ValueError, "scoring must be one of 'linear', 'query'"),
    (lambda: mfd.nn.ModalFusion([4], 3, temperature=0.0), ValueError, "temperature must be a finite number > 0"),
    (lambda: mfd.nn.ModalFusion([6, 4], 3)([X]), ValueError, "ModalFusion: features must hold 2 modalities, got 1"),
    (lambda: mfd.nn.ModalFusion([6, 4], 3)([X, X]), ValueError, r"features\[1\] must be of shape \[2, 4\]"),
    (lambda: mfd.nn.ModalFusion([6, 4], 3)([X, H[:1]]), ValueError, r"features\[1\] must be of shape \[2, 4\]"),
    (lambda: mfd.nn.ModalFusion([6, 4], 3)([X, H.half()]), TypeError, r"features\[1\] must be float32 as the module"),
    (lambda: mfd.nn.ModalFusion([6, 4], 3)([X, H.long()]), TypeError, r"features\[1\] must be a float16"),
    (lambda: mfd.nn.ModalFusion([6, 4], 3)([X, H], X > 0), ValueError, r"present must be of shape \[2, 2\]"),
    (lambda: mfd.nn.ModalFusion([6, 4], 3)([X, H], X), TypeError, "present must be a bool tensor"),
    (lambda: mfd.nn.ModalFusion([6, 4], 3)([X, H], temperature=-1.0), ValueError, "temperature must be a finite"),
    (lambda: mfd.nn.GatedFusion(6, kind="relu"), ValueError, "GatedFusion: kind must be one of 'tanh', 'sigmoid'"),
    (lambda: mfd.nn.GatedFusion(6, 4), ValueError, "h_features must be 6"),
    (lambda: mfd.nn.GatedFusion(6, 4, 5, kind="film"), ValueError, "out_features must be 6"),
    (lambda: mfd.nn.GatedFusion(6, kind="gmu", per_channel=True), ValueError, "per_channel must be False"),
    (lambda: mfd.nn.GatedFusion(6, 4, kind="film")(X, X), ValueError, r"GatedFusion: h must be of shape \[2, 4\]"),
    (lambda: mfd.nn.GatedFusion(6)([X], X), TypeError, "GatedFusion: x must be a tensor"),
    (lambda: mfd.nn.GatedFusion(6)(X, X, X > 0), ValueError, r"present must be of shape \[2, 2\]"),
    (lambda: mfd.nn.LowRankFusion([6], 3, 0), ValueError, "LowRankFusion: rank must be at least 1"),
    (lambda: mfd.nn.LowRankFusion([6], 3, 2.0), TypeError, "LowRankFusion: rank must be an int"),
    (lambda: mfd.nn.LowRankFusion([6, 4], 3, 2)([X, X]), ValueError, r"LowRankFusion: features\[1\]"),
    (lambda: mfd.nn.ModalityDropout(2, 1.5), ValueError, r"ModalityDropout: p must be in \[0, 1\]"),
    (lambda: mfd.nn.ModalityDropout(2, [0.1]), ValueError, r"p must be in \[0, 1\], one number or 2"),
    (lambda: mfd.nn.ModalityDropout(2, "0.1"), TypeError, "p must be a number or a sequence of numbers"),
    (lambda: mfd.nn.ModalityDropout(2, fill_features=[3]), ValueError, "fill_features must be 2 widths"),
    (lambda: mfd.nn.ModalityDropout(2)([X, H[:1]]), ValueError, r"features\[1\] must be of shape \[2, D\]"),
    (lambda: mfd.nn.ModalityDropout(2, row_dims=1)([X, X[:1]]), ValueError, r"must be of shape \[2, ..., D\]"),
    (lambda: mfd.nn.ModalityDropout(2)([X, H], torch.ones(2)), TypeError, "present must be a bool tensor"),
]


@pytest.mark.parametrize(("wrong", "error", "match"), ERRORS, ids=[m for _, _, m in ERRORS])
def test_errors_of_fusion_modules(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()


# ------------------------------------------------------------------------------------------------------- MFDLoss


def test_mfd_loss_module_distils_modality_weights():
    """A student's pool learns its teacher's modality weights from the pool term alone."""
    features = [torch.randn(32, 5) for _ in range(3)]
    teacher = mfd.nn.ModalFusion([5, 5, 5], 5, scoring="linear")
    target = teacher(features).weights.detach()
    student = mfd.nn.ModalPool(5, 3)
    head = nn.Linear(5, 4)
    criterion = mfd.nn.MFDLoss(soft_weight=0.0, pool_weight=1.0)
    logits = torch.randn(32, 4)

    def loss():
        arguments = (features, student.query, head.weight, head.bias, logits)
        return criterion(*arguments, bias=student.bias, teacher_pool_weights=target).loss

    weights = student(features).weights
    expected = F.kl_div(weights.log(), target, reduction="batchmean")
    torch.testing.assert_close(loss(), expected)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    start = float(loss().detach())
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        assert head.weight.grad is None or not head.weight.grad.any()
        optimizer.step()
    assert float(loss().detach()) < 0.7 * start
    with pytest.raises(TypeError, match="no option 'teacher_pool_weights'"):
        mfd.nn.MFDLoss(teacher_pool_weights=target)


def test_modules_pickled_by_their_former_module_path_still_load():
    """``mfd_fast.nn`` was one file: what it pickled names ``mfd_fast.nn.<class>``."""
    module = mfd.nn.DistillationLoss(temperature=3.0)
    pickled = pickle.dumps(module, protocol=0)
    former = pickled.replace(b"mfd_fast.nn.ops", b"mfd_fast.nn")
    assert former != pickled
    assert pickle.loads(former).options == module.options


def test_the_folded_bias_gradient_keeps_its_digits_over_many_rows():
    """Eager sums the rows of each projection pairwise; one product over 4097 rows was up to five times as far off."""
    torch.manual_seed(0)
    a, bias, up = torch.rand(4097, 3), torch.randn(3, 40, requires_grad=True), 1 + 0.1 * torch.randn(4097, 40)
    product = weighted_bias(a, bias)
    (found,) = torch.autograd.grad(product, bias, up)
    exact = a.double().T @ up.double()
    eager = torch.stack([(a[:, m, None] * up).sum(0) for m in range(3)])
    assert_close_to_float64(found, exact, eager, "d bias")
    assert_close_to_float64(product.detach(), a.double() @ bias.detach().double(), a @ bias.detach(), "product")
