"""The torch.library road, which torch.compile takes: opcheck, and the same numbers as the eager road."""

import contextlib
import itertools

import pytest
import torch
from harness import evaluate, map_tensors, on
from on_device import here
from op_db import RECORDS, samples_on
from torch.utils._python_dispatch import TorchDispatchMode

from mfd_fast.backends import choice

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LOSS = RECORDS["distill_loss"]
#: Ops with a scalar pass of their own, which has no backward.
SCALAR = (LOSS, RECORDS["linear_distill_loss"])
ROAD = [(r, b, name) for r in RECORDS.values() if r.registered for b in r.backends for name in samples_on(r, b)]
ROAD_IDS = [f"{r.name}-{backend}-{name}" for r, backend, name in ROAD]
ON_KERNELS = [(case, i) for case, i in zip(ROAD, ROAD_IDS, strict=True) if case[1] != "reference"]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every mfd_fast op that runs, and sends those calls to one backend."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mfd_fast":
            args = on_backend(func, args, self.backend)
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def on_backend(func, args, backend):
    at = [a.name for a in func._schema.arguments].index("backend")
    return (*args[:at], backend, *args[at + 1 :])


@contextlib.contextmanager
def compiling():
    """Public functions take the registered road, eagerly, small calls too (test_traced_reference has those)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "TRACED_ELEMENTS", {})
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


def recorded(record, name, backend, names):
    arguments = record.samples(rows=4, classes=5)[name]
    with compiling(), Recorder(backend) as recorder:
        evaluate(record, record.op, arguments, names=names)
    assert recorder.calls
    return recorder.calls


#: An op is the same on every backend but for what it calls: the backends take turns.
TURNS = zip(dict.fromkeys((r, n) for r, _, n in ROAD), itertools.cycle(("cpu", "cuda", "reference")), strict=False)
IN_TURN = [(r, b, n) for (r, n), b in TURNS]


@pytest.mark.quick("record")
@pytest.mark.parametrize(("record", "backend", "name"), IN_TURN, ids=[f"{r.name}-{b}-{n}" for r, b, n in IN_TURN])
def test_opcheck(record, name, backend):
    seen = set()
    for names in (record.differentiable[:1], record.differentiable):
        for func, args in recorded(record, name, backend, names):
            seen.add(func._schema.name.removeprefix("mfd_fast::"))
            differentiable = not func._schema.name.endswith("backward")
            leaves = [map_tensors(a, lambda t: t.detach().clone()) for a in args]
            flat = [t for a in leaves for t in (a if isinstance(a, (list, tuple)) else [a])]
            first = next(t for t in flat if torch.is_tensor(t) and t.is_floating_point())
            first.requires_grad_(differentiable)
            here(torch.library.opcheck)(func, tuple(leaves), test_utils=UTILITIES)
    assert seen <= set(record.registered)
    assert len(seen) > 1 or name == "plain" or record in SCALAR


def test_every_registered_op_is_checked():
    seen = {
        func._schema.name.removeprefix("mfd_fast::")
        for record, backend, name in ROAD
        if backend == "cpu"
        for names in (record.differentiable[:1], record.differentiable)
        for func, _ in recorded(record, name, backend, names)
    }
    assert seen == {name for r in RECORDS.values() for name in r.registered}  # mfd_loss is traced into these ops
    assert seen == {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "mfd_fast::" in name}


@pytest.mark.parametrize("wrt", ["first", "all"])
@pytest.mark.parametrize(("record", "backend", "name"), [c for c, _ in ON_KERNELS], ids=[i for _, i in ON_KERNELS])
def test_registered_road_gives_the_same_numbers(record, name, backend, wrt):
    arguments = record.samples(rows=4)[name]
    names = record.differentiable[:1] if wrt == "first" else record.differentiable
    eager = evaluate(record, on(record, backend), arguments, names=names)
    with compiling():
        found = evaluate(record, on(record, backend), arguments, names=names)
    assert found.outputs.keys() == eager.outputs.keys()
    for (key, a), (_, b) in zip(found.items(), eager.items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("wrt", ["first", "one by one", "all"])
@pytest.mark.parametrize(
    ("record", "name"),
    [(record, name) for record, backend, name in ROAD if backend == "reference"],
    ids=[i for (_, backend, _), i in zip(ROAD, ROAD_IDS, strict=True) if backend == "reference"],
)
def test_gradients_that_the_reference_backend_writes_out(record, name, wrt):
    """They serve the registered ops; autograd through the reference formulas knows nothing of them."""
    arguments = record.samples(dtype=torch.float64)[name]
    choices = [(n,) for n in record.differentiable] if wrt == "one by one" else [record.differentiable]
    for names in [record.differentiable[:1]] if wrt == "first" else choices:
        expected = evaluate(record, on(record, "reference"), arguments, names=names)
        with compiling(), Recorder("reference") as recorder:
            found = evaluate(record, record.op, arguments, names=names)
        assert recorder.calls
        assert found.grads.keys() == expected.grads.keys()
        for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
            torch.testing.assert_close(a, b, msg=f"{names} {key}")


# Those of a TopK and of a label treated apart are the kernel's own.
COMMON = [name for name in samples_on(LOSS, "cpu") if not name.startswith(("topk", "dkd", "nkd"))]


@pytest.mark.parametrize("name", COMMON)
def test_statistics_of_the_reference_are_those_of_the_kernels(name):
    """The first five; the others belong to the backend that wrote them."""
    arguments = LOSS.samples(dtype=torch.float64)[name]
    with compiling(), Recorder("cpu") as recorder:
        evaluate(LOSS, LOSS.op, arguments)
    for func, args in recorder.calls:
        if func._schema.name.endswith("distill_rows"):
            stats = [func(*each)[2][:, :5] for each in (on_backend(func, args, "reference"), args)]
            torch.testing.assert_close(*stats)
