"""Registration with torch.library: what compilers and dispatch modes see instead of kernels.

An op takes problems, argument by argument as their fields say, and ``backend``; "" means: choose when the op runs.
Numbers in the place of tensors become 0-d tensors, so that changing them never recompiles. The backward of an op is an
op of its own, ``<name>_backward``: it takes the same problems, then what was saved, upstream gradients and ``needs``,
and returns the gradients as one list, with an empty tensor where none is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..codes import DIVERGENCES, TAILS
from ..divergences import Divergence, divergence_from
from ..problems.problem import Problem
from ..problems.teachers import TopKRows
from ..types import LogitTransform
from .autograd import save, saved

_library = torch.library.Library("mfd_fast", "DEF")

# ------------------------------------------------------------------------------------------ fields as arguments


def _of_transform(value: LogitTransform | None) -> list[float]:
    return [] if value is None else [float(value.scale), float(value.softcap or 0.0), float(value.standardize)]


def _to_transform(values: Sequence[float]) -> LogitTransform | None:
    if not values:
        return None
    scale, softcap, standardize = values
    return LogitTransform(scale=scale, softcap=softcap or None, standardize=bool(standardize))


def _to_divergence(values: Sequence[float]) -> Divergence:
    return divergence_from(list(DIVERGENCES)[int(values[0])], (values[1], values[2]))


def _to_topk(values: Sequence[int]) -> TopKRows | None:
    return TopKRows(list(TAILS)[values[0]], bool(values[1]), bool(values[2])) if values else None


class _Codec(NamedTuple):
    """An option as a schema has it: its type there, and the ways there and back."""

    schema: str
    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


_CODECS = {
    "float": _Codec("float", float, lambda value: value),
    "float?": _Codec("float?", lambda value: None if value is None else float(value), lambda value: value),
    "LogitTransform": _Codec("float[]", _of_transform, _to_transform),
    "Divergence": _Codec("float[]", lambda d: [float(DIVERGENCES[d.name]), *d.parameters], _to_divergence),
    "TopKRows": _Codec("int[]", lambda t: [] if t is None else [TAILS[t.tail], *map(int, t[1:])], _to_topk),
}


def _fields(problem: type[Problem]) -> Iterator[tuple[str, str]]:
    """(field, its type), in the order of the arguments."""
    yield from ((name, "Tensor?") for name in problem.TENSORS)
    yield from ((name, "Tensor?[]") for name in problem.LISTS)
    yield from problem.OPTIONS.items()


def _schema(problems: Sequence[type[Problem]]) -> str:
    fields = [field for problem in problems for field in _fields(problem)]
    return ", ".join(f"{_CODECS[kind].schema if kind in _CODECS else kind} {name}" for name, kind in fields)


def _tensor(value: Any, dtype: torch.dtype, zero: bool) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if zero and value == 0:  # a term that is not computed
        return None
    # A CPU scalar on every device: reading it back at run time waits for nothing.
    # A product: torch.compile keeps a traced number symbolic in arithmetic, but bakes it into torch.full.
    return torch.ones((), dtype=dtype) * value


def pack(problems: Sequence[Problem]) -> list[Any]:
    """The arguments that stand for ``problems``."""
    dtype = problems[0].dtype  # type: ignore[attr-defined]
    found: list[Any] = []
    for problem in problems:
        for name, kind in _fields(type(problem)):
            value = getattr(problem, name)
            if kind == "Tensor?":
                value = _tensor(value, dtype, name in problem.ZERO)
            elif kind == "Tensor?[]":
                value = [_tensor(v, dtype, False) for v in value]
            elif kind in _CODECS:
                value = _CODECS[kind].pack(value)
            found.append(value)
    return found


def _number(value: Any) -> Any:
    """CPU scalars become numbers; device scalars stay where the kernel reads them."""
    scalar = isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu"
    return value.item() if scalar else value


def unpack(problems: Sequence[type[Problem]], args: Sequence[Any], *, read: bool) -> list[Any]:
    """The problems that the arguments stand for; ``read``: CPU scalars may be read."""
    values = iter(args)
    found = []
    for kind_of_problem in problems:
        fields: dict[str, Any] = {}
        for name, kind in _fields(kind_of_problem):
            value = next(values)
            if kind == "Tensor?" and value is None and name in kind_of_problem.ZERO:
                value = 0.0
            elif kind in ("Tensor?", "Tensor?[]"):
                value = _number(value) if read else value
            elif kind in _CODECS:
                value = _CODECS[kind].unpack(value)
            fields[name] = value
        problem = kind_of_problem(**fields)
        problem.measure()
        found.append(problem)
    return found


# ---------------------------------------------------------------------------------------------- nested gradients


def flatten(record: Any) -> list[Any]:
    """The fields of a NamedTuple one after the other, those that are sequences last."""
    found: list[Any] = []
    for value in record:
        if isinstance(value, (list, tuple)):
            found.extend(value)
        else:
            found.append(value)
    return found


def unflatten(kind: Any, flat: Sequence[Any], *lengths: int) -> Any:
    """``kind`` from its flat form; its last fields are sequences of these lengths."""
    start = len(kind._fields) - len(lengths)
    fields = list(flat[:start])
    for length in lengths:
        fields.append(list(flat[start : start + length]))
        start += length
    return kind(*fields)


# --------------------------------------------------------------------------------------------------------- ops


def define(
    name: str,
    problems: Sequence[type[Problem]],
    more: str,
    returns: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    read: bool = True,
) -> Callable[..., Any]:
    """Registers ``run(backend, *problems, *more)`` with its schema, and ``fake(*problems, *more)`` for its shapes.

    ``read``: its kernels take CPU scalars as numbers.
    """
    count = sum(1 for problem in problems for _ in _fields(problem))

    def implementation(*args: Any) -> Any:
        return run(args[count] or None, *unpack(problems, args[:count], read=read), *args[count + 1 :])

    def shapes(*args: Any) -> Any:
        return fake(*unpack(problems, args[:count], read=False), *args[count + 1 :])

    _library.define(f"{name}({_schema(problems)}, str backend{', ' + more if more else ''}) -> {returns}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mfd_fast::{name}", shapes, lib=_library)

    def call(backend: str, given: Sequence[Problem], *rest: Any) -> Any:
        return getattr(torch.ops.mfd_fast, name)(*pack(given), backend, *rest)

    return call


def define_backward(
    name: str,
    problems: Sequence[type[Problem]],
    more: str,
    run: Callable[..., Any],
    like: Callable[..., Any],
    *,
    read: bool = True,
) -> Callable[..., Any]:
    """The backward of op ``name``: ``run(backend, *problems, *more, needs)`` returns nested gradients, and
    ``like(*problems)`` tensors of their shapes. It has no derivatives.
    """

    def nothing(problem: Any) -> Tensor:
        return torch.empty(0, device=problem.device)

    def filled(backend: str | None, *args: Any) -> list[Tensor]:
        found = flatten(run(backend, *args))
        return [nothing(args[0]) if g is None else g for g in found]

    def shapes(*args: Any) -> list[Tensor]:
        templates = flatten(like(*args[: len(problems)]))
        return [t.new_empty(t.shape) if need else nothing(args[0]) for t, need in zip(templates, args[-1], strict=True)]

    call = define(f"{name}_backward", problems, f"{more}, bool[] needs", "Tensor[]", filled, shapes, read=read)

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"mfd_fast::{name}_backward has no derivatives; call the op of mfd_fast eagerly for second derivatives, "
            "or with backend='reference'"
        )

    torch.library.register_autograd(f"mfd_fast::{name}_backward", refuse, lib=_library)
    return call


def differentiate(
    name: str,
    problems: Sequence[type[Problem]],
    kept: Callable[[tuple[Any, ...]], Sequence[Tensor]],
    constant: Callable[[tuple[Any, ...]], Sequence[Tensor]],
    backward: Callable[..., dict[tuple[int, str], Any]],
) -> None:
    """Autograd of op ``name``.

    ``kept`` and ``constant`` of the outputs: what the backward reads, and what has no gradient.
    ``backward(backend, problems, kept, grads, need)`` returns gradients by (number of the problem, field), where
    ``need(number, field)`` tells which are wanted.
    """
    places: dict[tuple[int, str], int] = {}
    for k, problem in enumerate(problems):
        for field, _ in _fields(problem):
            places[k, field] = len(places)
    count = len(places)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = tuple(output) if isinstance(output, (list, tuple)) else (output,)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*constant(outputs))
        save(ctx, tuple(unpack(problems, inputs[:count], read=False)), *kept(outputs))
        ctx.backend = inputs[count]
        ctx.lengths = [
            len(v) if isinstance(v, list) and all(isinstance(t, Tensor) for t in v) else None for v in inputs
        ]

    def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        of, more_saved = saved(ctx)
        needed = ctx.needs_input_grad
        found = backward(ctx.backend, of, more_saved, grads, lambda k, field: needed[places[k, field]])
        # A list of tensors has a list of gradients.
        out: list[Any] = [None if length is None else [None] * length for length in ctx.lengths]
        for place, gradient in found.items():
            if gradient is not None:
                out[places[place]] = gradient
        return tuple(out)

    torch.library.register_autograd(f"mfd_fast::{name}", run, setup_context=setup, lib=_library)
