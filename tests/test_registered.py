"""The torch.library road, which torch.compile takes: opcheck, and the same numbers as the eager road."""

import contextlib

import pytest
import torch
from harness import evaluate, map_tensors, on
from op_db import RECORDS
from torch.utils._python_dispatch import TorchDispatchMode

import mfd_fast as mfd
from mfd_fast.testing import poison

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LOSS = RECORDS["distill_loss"]
ROAD = [(r, name) for r in RECORDS.values() if r.registered for name in r.samples()]
ROAD_IDS = [f"{r.name}-{name}" for r, name in ROAD]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every mfd_fast op that runs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mfd_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def compiling():
    """Public functions take the registered road, eagerly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


def recorded(record, name, backend, names):
    arguments = record.samples(rows=4, classes=5)[name]
    with compiling(), Recorder() as recorder:
        evaluate(record, on(record, "cpu"), arguments, names=names)
    assert recorder.calls
    return [
        (func, tuple(backend if isinstance(a, str) and a == "cpu" else a for a in args))
        for func, args in recorder.calls
    ]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("record", "name"), ROAD, ids=ROAD_IDS)
def test_opcheck(record, name, backend):
    seen = set()
    for names in (record.differentiable[:1], record.differentiable):
        for func, args in recorded(record, name, backend, names):
            seen.add(func._schema.name.removeprefix("mfd_fast::"))
            differentiable = not func._schema.name.endswith("backward")
            leaves = map_tensors(args, lambda t: t.detach().clone())
            first = leaves[0] if torch.is_tensor(leaves[0]) else leaves[0][0]
            first.requires_grad_(differentiable)
            torch.library.opcheck(func, leaves, test_utils=UTILITIES)
    assert seen <= set(record.registered)
    assert len(seen) > 1 or name == "plain" or record is LOSS


def test_every_registered_op_is_checked():
    seen = {
        func._schema.name.removeprefix("mfd_fast::")
        for record, name in ROAD
        for names in (record.differentiable[:1], record.differentiable)
        for func, _ in recorded(record, name, "cpu", names)
    }
    assert seen == {name for r in RECORDS.values() for name in r.registered}  # mfd_loss is traced into these ops
    assert seen == {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "mfd_fast::" in name}


@pytest.mark.parametrize("wrt", ["first", "all"])
@pytest.mark.parametrize(
    ("record", "backend", "name"),
    [(r, b, name) for r, name in ROAD for b in r.backends if b != "reference"],
    ids=[f"{i}-{b}" for (r, _), i in zip(ROAD, ROAD_IDS, strict=True) for b in r.backends if b != "reference"],
)
def test_registered_road_gives_the_same_numbers(record, name, backend, wrt):
    arguments = record.samples(rows=4)[name]
    names = record.differentiable[:1] if wrt == "first" else record.differentiable
    eager = evaluate(record, on(record, backend), arguments, names=names)
    with compiling(), poison():
        found = evaluate(record, on(record, backend), arguments, names=names)
    assert found.outputs.keys() == eager.outputs.keys()
    for (key, a), (_, b) in zip(found.items(), eager.items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("needs", [(True, False, False, False), (False, True, True, True), (True,) * 4])
def test_reference_entry_points_agree_with_the_kernels(backend, needs):
    """The gradients that the reference backend writes out, against autograd through the reference formulas."""
    record = RECORDS["distill_terms"]
    names = tuple(n for n, need in zip(record.differentiable, needs, strict=True) if need)
    arguments = record.samples(dtype=torch.float64)["per_row"]
    expected = evaluate(record, on(record, "reference"), arguments, names=names)
    found = evaluate(record, on(record, backend), arguments, names=names)
    for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.parametrize("name", LOSS.samples())
def test_reference_backend_of_the_registered_ops(name):
    """Its hand-written gradients serve registered ops that were asked to run on the reference."""
    arguments = LOSS.samples(dtype=torch.float64)[name]
    for names in (("student",), ("student", "teacher", "temperature", "teacher_temperature")):
        expected = evaluate(LOSS, on(LOSS, "reference"), arguments, names=names)
        with compiling(), Recorder() as recorder:
            found = evaluate(LOSS, on(LOSS, "cpu"), arguments, names=names)
        for (key, a), (_, b) in zip(found.items(), expected.items(), strict=True):
            torch.testing.assert_close(a, b, msg=key)
        for func, args in recorder.calls:
            swapped = tuple("reference" if isinstance(a, str) and a == "cpu" else a for a in args)
            for a, b in zip(func(*swapped), func(*args), strict=True):
                torch.testing.assert_close(a, b, msg=str(func))


@pytest.mark.parametrize("op", ["modal_pool", "feature_loss"])
def test_reference_backend_of_the_fusion_ops(op):
    """Its hand-written gradients, against autograd through the reference formulas."""
    record = RECORDS[op]
    for arguments in record.samples(dtype=torch.float64).values():
        expected = evaluate(record, on(record, "reference"), arguments)
        with compiling():
            found = evaluate(record, lambda a=record, **k: a.op(**k), arguments)
            with mfd.use_backend("reference"):
                written = evaluate(record, lambda a=record, **k: a.op(**k), arguments)
        for (key, a), (_, b), (_, c) in zip(found.items(), expected.items(), written.items(), strict=True):
            torch.testing.assert_close(a, b, msg=key)
            torch.testing.assert_close(c, b, msg=key)
