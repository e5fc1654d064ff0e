"""How the battery calls an op: argument trees, gradients, the float64 reference and eager side by side."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mfd_fast as mfd
from mfd_fast.backends import plans
from mfd_fast.backends.protocol import OPS
from mfd_fast.testing import assert_bitwise_equal, assert_close_to_float64, poison

Arguments = dict[str, Any]
BACKENDS = ("reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class ErrorInput:
    """Changes to a valid call (None as ``sample``: the plain one), the exception, and what its text must say."""

    changes: Arguments
    error: type[Exception]
    match: str
    id: str = ""


#: Of each public op.
BACKENDS_OF = {name: op.backends for name, op in OPS.items()}


@dataclass(frozen=True)
class OpRecord:
    """One public op. ``samples(dtype, distance, seed, rows, classes)`` maps names to keyword arguments."""

    op: Callable[..., Any]
    eager: Callable[..., Any]
    samples: Callable[..., dict[str, Arguments]]
    differentiable: tuple[str, ...]
    outputs: Callable[[Any], dict[str, Tensor]]
    errors: Callable[[], list[ErrorInput]]
    registered: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)

    @property
    def name(self) -> str:
        return self.op.__name__

    @property
    def backends(self) -> tuple[str, ...]:
        return BACKENDS_OF[self.name]


@dataclass
class Result:
    outputs: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)

    def items(self):
        return [*self.outputs.items(), *((f"d {name}", grad) for name, grad in self.grads.items())]


def map_tensors(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """``f`` of every tensor in a tree of dicts, lists, tuples and TopK teachers."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, mfd.TopK):
        mask = None if value.mask is None else f(value.mask)
        return dataclasses.replace(value, values=f(value.values), indices=f(value.indices), mask=mask)
    if isinstance(value, dict):
        return {k: map_tensors(v, f) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, f) for v in value)
    return value


def named_tensors(arguments: Arguments) -> dict[str, Tensor]:
    """``features[0]``, ``query`` …: every tensor among the arguments."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, mfd.TopK):
            found.update({f"{name}.values": value.values, f"{name}.indices": value.indices})
            found.update({} if value.mask is None else {f"{name}.mask": value.mask})
        elif isinstance(value, (list, tuple)):
            found.update({f"{name}[{i}]": v for i, v in enumerate(value) if isinstance(v, Tensor)})
    return found


def to_float64(arguments: Arguments) -> Arguments:
    return map_tensors(arguments, lambda t: t.double() if t.dtype.is_floating_point else t)


def requiring_grad(arguments: Arguments, names: tuple[str, ...]) -> Arguments:
    """Leaves that require grad, in the memory of the arguments (so that their layout stays)."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_() if t.dtype.is_floating_point else t

    return {k: map_tensors(v, leaf) if k in names else v for k, v in arguments.items()}


def upstream(output: Tensor, seed: int) -> Tensor:
    """A random grad_output whose values every floating dtype can represent."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=rng).half().bfloat16().to(output.dtype)


#: Bytes of larger storages are not compared.
MOST_WATCHED = 64 << 20


@contextlib.contextmanager
def watched(tensors: dict[str, Tensor], poisoned: bool = True) -> Iterator[None]:
    """No element of the tensors' storages is written, no version counted up; with ``poisoned``, every element of what
    backends allocate is written, and nothing beyond it.
    """
    before = []
    for name, t in tensors.items():
        storage = t.untyped_storage()
        if t.device.type == "cpu" and storage.nbytes() <= MOST_WATCHED and not t.is_inference():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            before.append((name, t, t._version, whole, whole.clone()))
    with poison() if poisoned else contextlib.nullcontext():
        yield
    for name, t, version, whole, kept in before:
        assert torch.equal(whole, kept), f"{name} was written"
        assert t._version == version, f"{name}: {t._version - version} writes in place were counted"


def evaluate(
    record: OpRecord,
    call: Callable[..., Any],
    arguments: Arguments,
    *,
    names: tuple[str, ...] | None = None,
    grad_outputs: Callable[[Tensor, int], Tensor] = upstream,
    poisoned: bool = True,
) -> Result:
    """Outputs and the gradients of all differentiable arguments, for random upstream gradients; :func:`watched`.

    A call that leaves plans is repeated: they must give the same bits.
    """
    names = record.differentiable if names is None else names
    plans.forget()
    with watched(named_tensors(arguments), poisoned):
        found = _evaluate(record, call, requiring_grad(arguments, names), grad_outputs)
        if plans.learned():
            again = _evaluate(record, call, requiring_grad(arguments, names), grad_outputs)
            for (name, a), (_, b) in zip(found.items(), again.items(), strict=True):
                assert_bitwise_equal(a, b, f"{name} of a plan")
        return found


def _evaluate(
    record: OpRecord, call: Callable[..., Any], arguments: Arguments, grad_outputs: Callable[[Tensor, int], Tensor]
) -> Result:
    raw = call(**arguments)
    outputs = raw if isinstance(raw, dict) else record.outputs(raw)
    leaves = {k: t for k, t in named_tensors(arguments).items() if t.requires_grad}
    # In the order of their names, whatever the order of the outputs: one upstream gradient per name.
    ends = [outputs[k] for k in sorted(outputs) if outputs[k].requires_grad]
    seeds = [sum(k.encode()) for k in sorted(outputs) if outputs[k].requires_grad]
    result = Result({k: v.detach() for k, v in outputs.items()})
    if leaves and ends:
        ups = [grad_outputs(end, seed) for end, seed in zip(ends, seeds, strict=True)]
        with watched({f"grad_output {k}": up for k, up in enumerate(ups)}, poisoned=False):
            grads = torch.autograd.grad(ends, list(leaves.values()), ups, allow_unused=True, materialize_grads=True)
        result.grads = dict(zip(leaves, grads, strict=True))
    return result


def on(record: OpRecord, backend: str) -> Callable[..., Any]:
    """The public op on one backend; a backend that cannot run raises BackendError."""
    return lambda **arguments: record.op(**arguments, backend=backend)


def reference64(record: OpRecord, arguments: Arguments, **options: Any) -> Result:
    return evaluate(record, on(record, "reference"), to_float64(arguments), **options)


def stacked(results: list[Result]) -> Result:
    """Many small results as one, so that a bound on errors is a statistic and not luck."""
    out = Result()
    for kind in ("outputs", "grads"):
        for name in getattr(results[0], kind):
            getattr(out, kind)[name] = torch.stack([getattr(r, kind)[name] for r in results])
    return out


def assert_obeys_rule(actual: Result, exact: Result, eager: Result, context: str) -> None:
    assert actual.outputs.keys() == exact.outputs.keys()
    assert actual.grads.keys() == exact.grads.keys() == eager.grads.keys()
    pairs = dict(exact.items())
    yardstick = dict(eager.items())
    for name, value in actual.items():
        if not value.dtype.is_floating_point:
            assert torch.equal(value, pairs[name]), f"{context}: {name}"
            continue
        assert_close_to_float64(value, pairs[name], yardstick[name], f"{context}: {name}")


def assert_same(actual: Result, expected: Result, context: str, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal up to rounding, for two runs of one backend whose arithmetic may be ordered differently."""
    for (name, a), (other, b) in zip(actual.items(), expected.items(), strict=True):
        assert name == other
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{context}: {n}: {m}"
        )


__all__ = [
    "BACKENDS",
    "ErrorInput",
    "OpRecord",
    "Result",
    "assert_obeys_rule",
    "assert_same",
    "evaluate",
    "map_tensors",
    "mfd",
    "named_tensors",
    "on",
    "reference64",
    "requiring_grad",
    "stacked",
    "to_float64",
    "upstream",
    "watched",
]
