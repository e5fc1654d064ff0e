"""Plans: what a call like an earlier one skips, that it gives the same bits, and everything that must miss one."""

import copy
import gc
import os
import threading
import weakref

import pytest
import torch
from harness import map_tensors
from plan_calls import CALLS, assert_same_bits, labelled, logits, random, tensors_in
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import mfd_fast as mfd
from mfd_fast.backends import plans
from mfd_fast.testing import planned_calls, poison, without_plans

pytestmark = pytest.mark.skipif(plans.missing() is not None, reason="plans need PyTorch's C table")


each_op = pytest.mark.parametrize("name", CALLS)
each_change = pytest.mark.parametrize(("name", "argument"), [(n, a) for n, c in CALLS.items() for a in c[2]])


@pytest.fixture(autouse=True)
def _no_plans():
    plans.forget()
    yield
    plans.forget()


def run(op, arguments):
    """Outputs and gradients."""
    arguments = map_tensors(arguments, lambda t: t.detach().requires_grad_(t.requires_grad))
    outputs = tensors_in(op(**arguments))
    ends = [out for out in outputs if out.requires_grad]
    wanted = [t for t in tensors_in(list(arguments.values())) if t.requires_grad]
    found = [*outputs]
    if ends:
        upstream = [3 * random(*end.shape, seed=5) for end in ends]
        found += torch.autograd.grad(ends, wanted, upstream, allow_unused=True)
    return [None if t is None else t.detach() for t in found]


def checked(op, arguments):
    with without_plans():
        return run(op, arguments)


def hits_of(call):
    before = planned_calls()
    call()
    return planned_calls() - before


@each_op
def test_the_second_call_is_planned_and_equal(name):
    op, arguments, _ = CALLS[name]
    expected = checked(op, arguments())
    for k in range(3):
        assert hits_of(lambda: assert_same_bits(run(op, arguments()), expected)) == (k > 0)


@pytest.mark.parametrize("owner", plans._all, ids=[p.op for p in plans._all])
def test_every_parameter_is_covered(owner):
    changed = {k for op, arguments, changes in CALLS.values() if op.__name__ == owner.op for k in changes}
    # No plan covers these.
    assert set(owner.names) - {"teacher_weights", "process_group"} == changed


@each_change
def test_a_change_of_one_argument_is_never_overlooked(name, argument):
    op, arguments, changes = CALLS[name]
    changed = arguments() | {argument: changes[argument]()}
    expected = checked(op, changed)
    for _ in range(2):
        run(op, arguments())
    for _ in range(2):
        assert_same_bits(run(op, changed), expected)
    assert_same_bits(run(op, arguments()), checked(op, arguments()))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("student", random(6, 5, dtype=torch.bfloat16).requires_grad_()),
        ("student", random(5, 6).t().requires_grad_()),
        ("student", random(6, 7)[:, 1:6].requires_grad_()),
        ("student", random(7, 5)[1:].requires_grad_()),
        ("student", random(6, 5)),
        ("teacher", random(1, 5).expand(6, 5)),
        ("teacher", random(6, 5).requires_grad_()),
        ("temperature", torch.tensor(2.0)),
        ("temperature", torch.full((6,), 2.0)),
        ("soft_weight", torch.tensor(0.5)),
        ("reduction", "none"),
    ],
)
def test_another_dtype_layout_or_kind_has_no_part_in_a_plan(argument, value):
    for _ in range(2):
        run(mfd.distill_loss, logits())
    changed = logits() | {argument: value}
    expected = checked(mfd.distill_loss, changed)
    for _ in range(2):
        run(mfd.distill_loss, logits())
    same_metadata = (
        argument == "student" and value.requires_grad and value.is_contiguous() and value.dtype == torch.float32
    )
    assert hits_of(lambda: assert_same_bits(run(mfd.distill_loss, changed), expected)) == same_metadata


@pytest.mark.parametrize("rows", [0, 1])
def test_calls_of_no_rows_and_of_one(rows):
    leaf = random(rows, 3).requires_grad_()
    calls = (
        (
            mfd.distill_loss,
            {"student": leaf, "teacher": random(rows, 3), "labels": torch.zeros(rows, dtype=torch.int64)},
        ),
        (mfd.feature_loss, {"student": leaf, "teacher": random(rows, 3)}),
        (mfd.modal_pool, {"features": [leaf, random(rows, 3)], "query": random(3).requires_grad_()}),
        (
            mfd.mfd_loss,
            {
                "features": [leaf, random(rows, 3)],
                "query": None,
                "head_weight": random(4, 3).requires_grad_(),
                "head_bias": random(4).requires_grad_(),
                "teacher_logits": random(rows, 4),
            },
        ),
    )
    for op, arguments in calls:
        expected = checked(op, arguments)
        for k in range(2):
            assert hits_of(lambda op=op, a=arguments, e=expected: assert_same_bits(run(op, a), e)) == k, op


@each_op
def test_grad_mode_and_inference_mode_have_plans_of_their_own(name):
    op, arguments, _ = CALLS[name]
    for _ in range(2):
        run(op, arguments())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert hits_of(lambda: op(**arguments())) == 0
            assert hits_of(lambda: op(**arguments())) == 1
            assert not any(t.requires_grad for t in tensors_in(op(**arguments())))
    assert hits_of(lambda: run(op, arguments())) == 1


@each_op
def test_the_backend_asked_for_has_a_part_in_it(name, monkeypatch):
    op, arguments, _ = CALLS[name]
    for _ in range(2):
        run(op, arguments())
    with mfd.use_backend("reference"):
        assert hits_of(lambda: run(op, arguments())) == 0
    monkeypatch.setenv("MFD_FAST_BACKEND", "reference")
    assert hits_of(lambda: run(op, arguments())) == 0
    monkeypatch.setenv("MFD_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="MFD_FAST_BACKEND must be one of"):
        op(**arguments())
    monkeypatch.delenv("MFD_FAST_BACKEND")
    assert hits_of(lambda: run(op, arguments())) == 1


def test_threads_are_counted_in_every_call(monkeypatch):
    arguments = {"student": random(512, 2000).requires_grad_(), "teacher": random(512, 2000, seed=1)}
    expected = checked(mfd.distill_loss, arguments)
    before = torch.get_num_threads()
    try:
        for threads in (2, 1, 4):
            torch.set_num_threads(threads)
            assert_same_bits(run(mfd.distill_loss, arguments), expected)
            native = sorted(line for line in os.listdir("/proc/self/task"))
            assert len(native) >= threads
    finally:
        torch.set_num_threads(before)
    assert planned_calls() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 5])}, r"labels must be in \[0, 5\).*got 5 in row 5"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number > 0"),
        ({"teacher_temperature": 1e30}, "teacher_temperature must be between"),
        ({"soft_weight": float("inf")}, "soft_weight must be a finite number"),
        ({"hard_weight": float("nan")}, "hard_weight must be a finite number"),
        ({"label_smoothing": 1.5}, "label_smoothing must be in"),
        ({"reduction": "average"}, "reduction must be one of"),
        ({"teacher": random(6, 4)}, "teacher must have as many classes"),
        ({"teacher": random(5, 5)}, "teacher must be of shape"),
        ({"labels": torch.zeros(6)}, "labels must be a int64 tensor"),
        ({"weight": torch.zeros(5)}, "weight must be of shape"),
        ({"mask": torch.zeros(6)}, "mask must be a bool tensor"),
        ({"backend": "tpu"}, "backend must be one of"),
        ({"scale_by_temperature": 1}, "scale_by_temperature must be a bool"),
    ],
)
def test_no_message_is_lost(changes, message):
    for _ in range(3):
        run(mfd.distill_loss, labelled())
    before = planned_calls()
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=message):
            mfd.distill_loss(**labelled() | changes)
    assert planned_calls() == before


def test_labels_are_counted_in_every_call():
    arguments = labelled()
    for ignored in (0, 3, 6):
        arguments["labels"] = torch.tensor([-100] * ignored + [1] * (6 - ignored))
        assert_same_bits(run(mfd.distill_loss, arguments), checked(mfd.distill_loss, arguments))
        run(mfd.distill_loss, arguments)
        assert_same_bits(run(mfd.distill_loss, arguments), checked(mfd.distill_loss, arguments))


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_unusual_tensors_and_states_take_the_checks():
    op, arguments = mfd.distill_loss, logits()
    plain = {k: v.detach() for k, v in arguments.items()}
    for _ in range(2):
        run(op, arguments)
        op(**plain)
    expected = op(**plain)
    before = planned_calls()
    negative = torch.complex(torch.zeros(6, 5), -plain["teacher"]).conj().imag
    assert negative.is_neg()
    with torch.inference_mode():
        inferred = plain["teacher"].clone()
    for teacher in (negative, inferred, plain["teacher"].as_subclass(Subclass)):
        assert torch.equal(op(plain["student"], teacher), expected)
    with Mode():
        assert torch.equal(op(**plain), expected)
    freed = torch.empty(6, 5)
    freed.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="whose storage was freed"):
        op(plain["student"], freed)
    small = torch.empty(6, 5)
    small.untyped_storage().resize_(4)
    with pytest.raises(TypeError, match="whose storage was freed"):
        op(plain["student"], small)
    gradient = torch.func.grad(lambda s: op(s, plain["teacher"]))(plain["student"])
    student = plain["student"].clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(op(student, plain["teacher"]), student)[0])
    assert planned_calls() == before + 1
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(plain["student"], torch.ones(6, 5))
        assert forward_ad.unpack_dual(op(dual, plain["teacher"])).tangent is not None
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(t) for t in plain.values()))
    assert type(fake).__name__ == "FakeTensor"
    with pytest.raises(RuntimeError, match=r"jit\.trace cannot record"):
        torch.jit.trace(lambda s: op(s, plain["teacher"]), (plain["student"],), check_trace=False)
    assert planned_calls() == before + 1


@each_op
def test_a_plan_keeps_nothing_alive(name):
    op, arguments, _ = CALLS[name]
    # What stands between the leaves and the op, as a model's activations do.
    given = map_tensors(arguments(), lambda t: t * 1 if t.requires_grad else t)
    for _ in range(2):
        outputs = op(**given)
    watched = [weakref.ref(t) for t in tensors_in(list(given.values()))]
    sum(out.sum() for out in tensors_in(outputs) if out.requires_grad).backward()
    del given
    gc.collect()
    assert planned_calls() == 1
    assert [ref() for ref in watched if ref() is not None] == []


@each_op
def test_a_change_in_place_is_noticed(name):
    op, arguments, _ = CALLS[name]
    for _ in range(2):
        given = arguments()
        outputs = op(**given)
        with torch.no_grad():
            tensors_in(list(given.values()))[-1].logical_not_() if tensors_in(list(given.values()))[
                -1
            ].dtype == torch.bool else tensors_in(list(given.values()))[-1].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(out.sum() for out in tensors_in(outputs) if out.requires_grad).backward()
    assert planned_calls() == 1


def test_backwards_of_a_planned_call():
    """Twice, scaled, batched, and differentiable again."""
    arguments = labelled()

    def every_way():
        student = arguments["student"].detach().requires_grad_()
        loss = mfd.distill_loss(**arguments | {"student": student})
        first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
        scaled = torch.autograd.grad(3 * loss, student, retain_graph=True)[0]
        batched = torch.autograd.grad(loss, student, torch.ones(2), is_grads_batched=True, retain_graph=True)[0]
        (recorded,) = torch.autograd.grad(loss, student, create_graph=True)
        return first, second, scaled, batched, recorded, torch.autograd.grad(recorded.square().sum(), student)[0]

    with without_plans():
        expected = every_way()
    every_way()
    assert hits_of(lambda: assert_same_bits(every_way(), expected)) == 1


@pytest.mark.parametrize("name", ["modal_pool", "modal_pool of stacked features"])
def test_what_hooks_give_back_may_lie_otherwise(name):
    """A backward by a plan reads saved tensors only where they lie as those of the forward did."""
    op, arguments, _ = CALLS[name]

    def transposed():
        def other(t):
            return t.detach().transpose(0, -2).contiguous().transpose(0, -2).requires_grad_() if t.dim() > 1 else t

        return arguments() | {"features": map_tensors(arguments()["features"], other)}

    expected = checked(op, transposed())
    for _ in range(2):
        assert_same_bits(run(op, transposed()), expected)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous().clone()):
            assert_same_bits(run(op, transposed()), expected)


def test_outputs_of_plans_are_poisoned_too():
    for _ in range(2):
        run(mfd.distill_loss, labelled())
    with poison() as buffers:
        assert hits_of(lambda: run(mfd.distill_loss, labelled())) == 1
        assert len(buffers) == 2


def test_large_gradients_come_from_the_pool():
    from mfd_fast.backends import cpu

    arguments = {"student": random(600, 1000).requires_grad_(), "teacher": random(600, 1000, seed=1)}
    for _ in range(2):
        run(mfd.distill_loss, arguments)
    before = cpu.buffer_pool_stats()
    assert hits_of(lambda: run(mfd.distill_loss, arguments)) == 1
    after = cpu.buffer_pool_stats()
    assert after.reused + after.mapped == before.reused + before.mapped + 1


def test_shapes_of_which_there_is_no_end_do_not_pile_up():
    for rows in range(1, 600):
        with torch.no_grad():
            mfd.distill_loss(random(rows, 2), random(rows, 2))
    assert 0 < plans.learned() <= 256


def test_four_threads_at_once():
    expected = {
        rows: checked(
            mfd.distill_loss, {"student": random(rows, 5).requires_grad_(), "teacher": random(rows, 5, seed=1)}
        )
        for rows in range(1, 9)
    }
    faults = []

    def work(first):
        try:
            for k in range(300):
                rows = (first + k) % 8 + 1
                arguments = {"student": random(rows, 5).requires_grad_(), "teacher": random(rows, 5, seed=1)}
                assert_same_bits(run(mfd.distill_loss, arguments), expected[rows])
                if k % 50 == 49:
                    plans.forget()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_a_forked_process_has_plans_that_work():
    expected = checked(mfd.distill_loss, labelled())
    for _ in range(2):
        run(mfd.distill_loss, labelled())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = planned_calls()
            assert_same_bits(run(mfd.distill_loss, labelled()), expected)
            code = 0 if planned_calls() == before + 1 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_a_copied_module_runs_its_own_call():
    module = mfd.nn.DistillationLoss(temperature=2.0)
    arguments = logits()
    for _ in range(2):
        loss = module(arguments["student"], arguments["teacher"])
    other = copy.deepcopy(module)
    other.temperature = 5.0
    assert other(arguments["student"], arguments["teacher"]) != loss
    assert torch.equal(module(arguments["student"], arguments["teacher"]), loss)


def test_a_variable_turns_plans_off():
    assert plans.environment.plans() is (os.environ.get("MFD_FAST_PLANS") != "0")
    with without_plans():
        for _ in range(3):
            run(mfd.distill_loss, logits())
        assert plans.learned() == 0
    run(mfd.distill_loss, logits())
    assert plans.learned() == 1


def test_a_pytorch_without_the_table_checks_every_call(monkeypatch):
    monkeypatch.setattr(plans, "missing", lambda: "no table")
    expected = checked(mfd.distill_loss, labelled())
    for _ in range(3):
        assert_same_bits(run(mfd.distill_loss, labelled()), expected)
    assert plans.learned() == 0
