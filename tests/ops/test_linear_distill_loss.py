"""linear_distill_loss: what its chunks, its dropped rows and its frozen sides cost and change."""

import inspect
from collections import Counter

import pytest
import torch
from op_db import RECORDS
from torch.utils._python_dispatch import TorchDispatchMode

import mfd_fast as mfd
from mfd_fast.backends import chunked_heads, products, row_backend
from mfd_fast.backends.protocol import RowNeeds
from mfd_fast.bench.memory import peak_extra_bytes
from mfd_fast.problems import linear
from mfd_fast.problems.rows import check_rows

RECORD = RECORDS["linear_distill_loss"]


def heads(rows=40, width=6, classes=50, dtype=torch.float32):
    rng = torch.Generator().manual_seed(1)
    shapes = ((rows, width), (classes, width), (rows, width), (classes, width))
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


def gradients(arguments, names, **options):
    leaves = {k: arguments[k].detach().requires_grad_() for k in names}
    out = mfd.linear_distill_loss(**{**arguments, **leaves, **options})
    return out, torch.autograd.grad(out.loss.sum(), list(leaves.values()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_any_chunk_gives_the_same_numbers(backend, reduction):
    sample = {**RECORD.samples(rows=13)["everything"], "reduction": reduction, "backend": backend}
    names = ("student_hidden", "student_weight", "student_bias")
    whole, expected = gradients(sample, names, chunk_rows=13)
    for chunk_rows in (1, 2, 5, 12, 100, None):
        out, found = gradients(sample, names, chunk_rows=chunk_rows)
        for a, b in zip((*out, *found), (*whole, *expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        again, repeated = gradients(sample, names, chunk_rows=chunk_rows)
        assert all(torch.equal(a, b) for a, b in zip((*out, *found), (*again, *repeated), strict=True))


@pytest.mark.parametrize("backend", RECORD.backends)
def test_rows_that_do_not_count_reach_no_product(backend, monkeypatch):
    h, w, ht, wt = heads(rows=12)
    labels = torch.arange(12)
    labels[3:9] = -100
    mask = torch.ones(12, dtype=torch.bool)
    mask[0] = False
    for t in (h, ht):
        t[3:9] = torch.nan
        t[0] = torch.inf
    seen = []
    real = products.logits
    monkeypatch.setattr(products, "logits", lambda x, *rest: seen.append(x.shape[0]) or real(x, *rest))
    leaves = [h.requires_grad_(), w.requires_grad_(), wt]
    for chosen in (leaves[:2], leaves):
        wt.requires_grad_(len(chosen) == 3)
        out = mfd.linear_distill_loss(h, w, ht, wt, labels, mask=mask, hard_weight=1.0, backend=backend)
        grad, *of_weights = torch.autograd.grad(out.loss, chosen)
        assert all(g.isfinite().all() for g in of_weights)
    assert out.rows.item() == 5
    assert out.loss.isfinite()
    assert not grad[3:9].any()
    assert not grad[0].any()
    assert grad[[1, 2, 9, 10, 11]].isfinite().all()
    assert all(n == 5 for n in seen)


@pytest.mark.parametrize("backend", RECORD.backends)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_without_terms_is_zero_with_a_graph(backend, reduction):
    h, w, ht, wt = heads(rows=4)
    out = mfd.linear_distill_loss(h.requires_grad_(), w, ht, wt, soft_weight=0.0, reduction=reduction, backend=backend)
    (grad,) = torch.autograd.grad(out.loss.sum(), [h])
    assert not out.loss.any()
    assert not grad.any()


def test_the_dtype_is_float64_where_a_bias_is():
    h, w, ht, wt = heads(rows=4)
    assert mfd.linear_distill_loss(h, w, ht, wt, student_bias=torch.zeros(50).double()).loss.dtype == torch.float64


def test_hidden_states_without_a_view_are_copied_once(monkeypatch):
    """``hidden[:, :-1]`` is no matrix: each chunk must not flatten the whole again."""
    h = torch.randn(4, 7, 6)[:, :-1]
    w = torch.randn(50, 6)
    copies = []
    real = torch.Tensor.reshape
    monkeypatch.setattr(torch.Tensor, "reshape", lambda t, *shape: copies.append(tuple(t.shape)) or real(t, *shape))
    mfd.linear_distill_loss(h, w, h, w, chunk_rows=2, backend="cpu")
    assert sum(shape == (4, 6, 6) for shape in copies) == 2  # the student's and the teacher's


@pytest.mark.parametrize("backend", RECORD.backends)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_give_zero_with_a_graph(backend, reduction):
    h, w, ht, wt = heads(rows=4)
    leaves = [h.requires_grad_(), w.requires_grad_()]
    out = mfd.linear_distill_loss(
        *leaves, ht, wt, torch.full((4,), -100), hard_weight=1.0, reduction=reduction, backend=backend
    )
    assert out.rows.item() == 0
    assert not out.loss.any()
    for grad in torch.autograd.grad(out.loss.sum(), leaves):
        assert not grad.any()


@pytest.fixture
def counted(monkeypatch):
    """Calls of each product."""
    calls = {"logits": 0, "hidden_gradient": 0, "add_weight_gradient": 0}
    for name in calls:
        real = getattr(products, name)

        def wrapper(*args, _name=name, _real=real):
            calls[_name] += 1
            return _real(*args)

        monkeypatch.setattr(products, name, wrapper)
    return calls


def test_four_products_and_none_for_what_is_frozen(counted):
    h, w, ht, wt = heads()

    def step(hidden, weight):
        for name in counted:
            counted[name] = 0
        loss = mfd.linear_distill_loss(hidden, weight, ht, wt, backend="cpu").loss
        if loss.requires_grad:
            loss.backward()
        return tuple(counted.values())

    leaf = torch.Tensor.requires_grad_
    assert step(leaf(h.clone()), leaf(w.clone())) == (2, 1, 1)
    assert step(leaf(h.clone()), w) == (2, 1, 0)
    assert step(h, leaf(w.clone())) == (2, 0, 1)
    assert step(h, w) == (2, 0, 0)
    with torch.no_grad():
        assert step(leaf(h.clone()), leaf(w.clone())) == (2, 0, 0)
    for name in counted:
        counted[name] = 0
    mfd.linear_distill_loss(h, w, None, None, torch.zeros(40, dtype=torch.int64), soft_weight=0.0, hard_weight=1.0)
    assert counted["logits"] == 1


@pytest.mark.parametrize("backend", RECORD.backends)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_classes_of_a_transform_read_only_those_weights(side, backend):
    h, w, ht, wt = heads(classes=50)
    transform = {f"{side}_transform": mfd.LogitTransform(classes=40)}
    own, other = (w, wt) if side == "student" else (wt, w)
    own[40:] = torch.nan
    if side == "student":
        out, (grad,) = gradients(
            {"student_hidden": h, "student_weight": own, "teacher_hidden": ht, "teacher_weight": other[:40]},
            ("student_weight",),
            **transform,
            backend=backend,
        )
        assert not grad[40:].any()
        assert grad[:40].isfinite().all()
    else:
        out, _ = gradients(
            {"student_hidden": h, "student_weight": other[:40], "teacher_hidden": ht, "teacher_weight": own},
            ("student_hidden",),
            **transform,
            backend=backend,
        )
    assert out.loss.isfinite()


def test_weights_of_16_bits_are_widened_in_parts(monkeypatch):
    h, w, ht, wt = heads(classes=60, dtype=torch.bfloat16)
    sample = {"student_hidden": h, "student_weight": w, "teacher_hidden": ht, "teacher_weight": wt, "backend": "cpu"}
    monkeypatch.setattr("mfd_fast.backends.cpu.gemm.has_pair_product", lambda *_: False)
    whole, expected = gradients(sample, ("student_hidden", "student_weight"))
    monkeypatch.setattr(products, "WIDENED_BYTES", 7 * 6 * 4)
    out, found = gradients(sample, ("student_hidden", "student_weight"))
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-5, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4)


def test_logits_are_never_16_bits():
    """A bfloat16 head beside its float64 twin: the loss keeps float32's digits of what the operands say."""
    h, w, ht, wt = heads(rows=64, classes=200, dtype=torch.bfloat16)
    exact = mfd.linear_distill_loss(*(t.double() for t in (h, w, ht, wt)), backend="reference").loss
    for backend in ("reference", "cpu"):
        loss = mfd.linear_distill_loss(h, w, ht, wt, backend=backend).loss
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_temperature_shared_by_both_sides_has_one_gradient():
    sample = RECORD.samples(dtype=torch.float64)["plain"]
    sample["temperature"] = torch.tensor(1.7, dtype=torch.float64)
    for backend in ("cpu", "reference"):
        t = sample["temperature"].clone().requires_grad_()
        loss = mfd.linear_distill_loss(**{**sample, "temperature": t}, backend=backend).loss
        (found,) = torch.autograd.grad(loss, [t])
        step = 1e-6
        high, low = (
            mfd.linear_distill_loss(**{**sample, "temperature": t.detach() + e}, backend="reference").loss
            for e in (step, -step)
        )
        torch.testing.assert_close(found, (high - low) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_gradients_and_two_chunks_of_logits(dtype, masked, monkeypatch):
    rows, width, classes, chunk_rows = 600, 64, 5000, 200
    monkeypatch.setattr(products, "WIDENED_BYTES", 4 * width * classes // 3)  # a weight in parts
    h, w, ht, wt = heads(rows, width, classes, dtype)
    mask = torch.arange(rows) % 4 > 0 if masked else None
    leaves = [h.requires_grad_(), w.requires_grad_()]

    def step():
        out = mfd.linear_distill_loss(*leaves, ht, wt, chunk_rows=chunk_rows, mask=mask, backend="cpu")
        torch.autograd.grad(out.loss, leaves)

    step()
    sums = 4 * (h.numel() + w.numel())
    widened = 0 if dtype == torch.float32 else products.WIDENED_BYTES
    # Statistics, terms and labels of each row; of a chunk a few matrices [chunk, H].
    small = 160 * rows + 3 * 4 * chunk_rows * width
    assert peak_extra_bytes(step, torch.device("cpu")) <= sums + 2 * 4 * chunk_rows * classes + widened + small


@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "jsd", "tvd", "dkd", "nkd", mfd.AlphaBeta(0.6, 0.3)], ids=str
)
@pytest.mark.parametrize("backend", RECORD.backends)
def test_gradients_may_take_the_memory_of_the_logits(backend, divergence):
    rng = torch.Generator().manual_seed(2)
    n, classes = 3, 2100  # two tiles of the longest rows
    labels = torch.randint(classes - 2, (n,), generator=rng)
    column = 0.5 + torch.rand(n, generator=rng)
    standard, part = mfd.LogitTransform(standardize=True), mfd.LogitTransform(softcap=3.0, classes=classes - 2)
    options = [
        {"temperature": column, "teacher_temperature": column + 1, "label_smoothing": 0.1},
        {"student_transform": standard, "teacher_transform": mfd.LogitTransform(scale=0.5)},
        {"student_transform": part, "teacher_transform": part},
    ]
    kernels, needs = row_backend(backend), RowNeeds(True, True, True, False, [True])
    for case in options:
        sides = [torch.randn(n, classes, generator=rng) for _ in range(2)]
        z, t = (side.clone() for side in sides)
        rows = check_rows("distill_loss", z, t, labels, divergence=divergence, **case)
        statistics = kernels.per_row(rows, terms=False).statistics
        upstream = statistics, column, column + 1, needs
        apart = kernels.per_row_backward(rows, *upstream)
        assert torch.equal(z, sides[0])
        assert torch.equal(t, sides[1])
        narrow = kernels.per_row_backward(rows, *upstream, in_place=True, student_dtype=torch.bfloat16)
        assert torch.equal(narrow.student, apart.student.bfloat16())
        z.copy_(sides[0]), t.copy_(sides[1])
        over = kernels.per_row_backward(rows, *upstream, in_place=True)
        for a, b in zip((*apart[:3], *apart.teachers), (*over[:3], *over.teachers), strict=True):
            assert torch.equal(a, b)


def test_given_logits_of_the_teacher_are_not_written():
    h, w, _, _ = heads()
    t = torch.randn(40, 50, requires_grad=True)
    kept = t.detach().clone()
    loss = mfd.linear_distill_loss(h.requires_grad_(), w, t, None, reduction="none", backend="cpu").loss
    torch.autograd.grad(loss.sum(), [h, t])
    assert torch.equal(t, kept)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bad_label_has_the_number_of_its_row_under_compile(reduction):
    h, w, ht, wt = heads(rows=8)
    labels = torch.zeros(8, dtype=torch.int64)
    labels[5] = 50
    call = torch.compile(
        lambda *sides: mfd.linear_distill_loss(*sides, labels, hard_weight=1.0, reduction=reduction, chunk_rows=2).loss,
        backend="eager",
        fullgraph=True,
    )
    with pytest.raises(ValueError, match=r"linear_distill_loss: labels .* got 50 in row 5"):
        call(h, w, ht, wt)


def test_a_compiled_gradient_is_rounded_once():
    """The factor from upstream is float32."""
    h, w, ht, wt = heads(dtype=torch.bfloat16)
    t = torch.randn(40, 50, dtype=torch.bfloat16)
    factor = 1 + 3 * 2**-9  # bfloat16 has 1 + 2^-7
    for leaf, loss in (
        (h, lambda x: mfd.linear_distill_loss(x, w, ht, wt, reduction="sum").loss),
        (t / 2, lambda x: mfd.distill_loss(x, t, reduction="sum")),
    ):
        leaf.requires_grad_()
        (plain,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(leaf), leaf)
        (found,) = torch.autograd.grad(torch.compile(lambda x, f=loss: factor * f(x), backend="aot_eager")(leaf), leaf)
        assert torch.equal(found, (plain.float() * factor).bfloat16())


class Work(TorchDispatchMode):
    """Counts the calls that a GPU would launch a kernel for: all but views and allocations.

    Products of 16-bit operands into float32, which no CPU has, are computed in float32.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        alias = [r.alias_info for r in function._schema.returns]
        view = any(a is not None and not a.is_write for a in alias)
        if not view and function.overloadpacket.__name__ not in ("empty", "new_empty", "detach", "lift_fresh"):
            self.names.append(function.overloadpacket.__name__)
        if function._overloadname.startswith("dtype"):
            kwargs = dict(kwargs or {})
            *operands, dtype = args
            function = getattr(function.overloadpacket, "out" if "out" in kwargs else "default")
            args = [operand.to(dtype) for operand in operands]
        return function(*args, **kwargs or {})


def defaults():
    """What check_linear_distill_loss takes beside the tensors."""
    signature = inspect.signature(mfd.linear_distill_loss).parameters.values()
    options = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    return {name: value for name, value in options.items() if name not in ("process_group", "backend")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labelled", [False, True])
def test_six_launches_a_chunk(monkeypatch, labelled, dtype):
    """Four products and two kernels over the rows."""
    launches = []
    monkeypatch.setattr("mfd_fast.backends.triton.distill_loss.launch", lambda *_, **__: launches.append("kernel"))
    monkeypatch.setattr("mfd_fast.backends.triton.launch.interpreting", lambda: False)
    monkeypatch.setattr(products, "has_wide_sums", lambda _: True)
    monkeypatch.setattr(products, "_adds_wider", lambda _: True)

    def names(rows):
        labels = torch.zeros(rows, dtype=torch.int64) if labelled else None
        sides = zip(
            ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"),
            heads(rows, dtype=dtype),
            strict=True,
        )
        problem = linear.check_linear_distill_loss("op", labels=labels, **dict(sides), **options)
        launches.clear()
        with Work() as work:  # around the op itself it would be recorded as one call
            needs = chunked_heads.LinearGradients(student_hidden=True, student_weight=True)
            ones = torch.ones(rows)
            chunked_heads.run("triton", problem.rows, problem.loss, problem.heads, ones, ones, needs)
        return work.names + launches

    options = {**defaults(), "hard_weight": float(labelled), "chunk_rows": 8}
    more, few = Counter(names(32)), Counter(names(16))
    one = {name: (count - few[name]) / 2 for name, count in more.items() if count != few[name]}
    assert one == {"mm": 3, "addmm_" if dtype == torch.float32 else "addmm": 1, "kernel": 2}


@pytest.mark.parametrize("masked", [False, True])
def test_a_gpus_products_of_bfloat16(monkeypatch, masked):
    """With a gradient of the logits in bfloat16, float32 sums of its products, and every row's in its place."""
    h, w, ht, wt = heads(rows=20, dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, 50).bfloat16()
    mask = torch.arange(20) % 3 > 0 if masked else None
    sample = dict(zip(linear.HeadProblem.TENSORS, (h, w, bias, ht, wt, None), strict=True))
    names = ("student_hidden", "student_weight", "student_bias")
    wide = {name: None if t is None else t.double() for name, t in sample.items()}
    _, exact = gradients(wide, names, mask=mask, backend="reference")
    monkeypatch.setattr(products, "has_wide_sums", lambda _: True)
    monkeypatch.setattr(products, "_adds_wider", lambda _: True)
    problem = linear.check_linear_distill_loss(
        "op", labels=None, **{**defaults(), **sample, "mask": mask, "chunk_rows": 8}
    )
    factor = torch.full((20,), 1 / (20 if mask is None else int(mask.sum())))
    needs = chunked_heads.LinearGradients(*(True,) * 3)
    with Work() as work:
        found = chunked_heads.run("triton", problem.rows, problem.loss, problem.heads, factor, factor, needs)
    assert "addmm" in work.names
    for got, expected in zip(found.gradients, exact, strict=False):
        assert got.dtype == torch.bfloat16
        # Two roundings: of the logits' gradient and of the result.
        torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=2**-8 * float(expected.abs().max()))
