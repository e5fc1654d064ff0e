"""Plans: what the checks of one call have found, kept for the calls that are like it.

The shapes of this field are small: a checked call costs several times its kernel. So a call that has passed the checks
leaves a plan, and a later call that equals it in everything but addresses and numbers goes from the public function
into one native function (csrc/bindings/plans/plans.h), which reads the tensors, makes the outputs and runs the kernel.

Two calls are alike where all of this is equal:

- of each tensor dtype, device, shape, strides and whether its gradient is recorded;
- every other argument: options by value, of the numbers named in ``numbers`` only whether they are 0;
- grad mode, inference mode, ``use_backend`` and ``MFD_FAST_BACKEND``.

Addresses, those numbers, the thread count and the values behind the addresses are read in each call. A plan holds no
tensor. It has no messages either: whatever could raise one (a label out of range, a temperature of 0) and whatever is
unusual (subclasses, views that negate, inference tensors outside their mode, freed storage, functorch, dispatch and
function modes, tracing) goes the way of the full checks.

PyTorch's C table ``torch.Tensor.__dlpack_c_exchange_api__`` makes this possible without a tie to its ABI. Where it is
missing, or with ``MFD_FAST_PLANS=0``, every call is checked in full; both ways give the same bits.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..divergences import DIVERGENCES
from ..problems.checks import temperature_range
from ..problems.problem import SAVED, Problem
from ..types import LogitTransform
from . import environment

P = TypeVar("P", bound=Problem)

#: Types of the arguments that are values: frozen, hashable, equal where they mean the same.
OPTIONS = {LogitTransform, *(type(divergence) for divergence in DIVERGENCES.values())}

#: Parameters that say where a call runs, not what it computes.
NO_OPTIONS = ("process_group", "backend")

_enabled = environment.plans()
_all: list[Plans[Any]] = []
_module: ModuleType | None = None  # the native one, once a call has left a plan


class Places:
    """Where a native plan finds what it reads: the place of each argument's tensor or number among those of a call.

    Of an argument that is a sequence a list of places, -1 where an element is neither.
    """

    def __init__(
        self,
        names: Sequence[str],
        numbers: frozenset[str],
        arguments: tuple[Any, ...],
        check: Callable[[tuple[Any, ...]], Any],
    ) -> None:
        self.names, self._arguments, self._check = tuple(names), arguments, check
        self.given: list[Tensor] = []
        self.tensors: dict[str, Any] = {}
        self.numbers: dict[str, Any] = {}
        count = 0

        def place(value: Any, name: str) -> tuple[Any, Any]:
            nonlocal count
            if isinstance(value, Tensor):
                self.given.append(value)
                return len(self.given) - 1, -1
            if isinstance(value, (list, tuple)):
                both = [place(element, name) for element in value]
                return [tensor for tensor, _ in both], [number for _, number in both]
            if type(value) in (float, int) and name in numbers:
                count += 1
                return -1, count - 1
            return -1, -1

        for name, value in zip(names, arguments, strict=True):
            self.tensors[name], self.numbers[name] = place(value, name)

    def reads(self, place: Any, used: Tensor | None) -> bool:
        """Whether ``used`` is the tensor at ``place`` itself or a view of it, not a copy or an ordinary alias."""
        if used is None or not isinstance(place, int) or place < 0:
            return used is None
        given = self.given[place]
        if given.is_inference() != used.is_inference():
            return False
        return given.dtype == used.dtype and given.data_ptr() == used.data_ptr()

    def argument(self, name: str) -> int:
        """The place of an argument among all."""
        return self.names.index(name)

    def first(self) -> tuple[dict[str, int], dict[str, int]]:
        """The places of tensors and of numbers; of an argument that is a sequence that of its first element."""

        def one(place: Any) -> int:
            return place if isinstance(place, int) else one(place[0]) if place else -1

        tensors, numbers = ({k: one(v) for k, v in each.items()} for each in (self.tensors, self.numbers))
        return tensors, numbers

    def probed(self, which: int) -> tuple[list[float], Any]:
        """Numbers that occur nowhere else in place of those that are read in each call, 0 in place of 0, and the
        problem of a call with them; others for each ``which``.
        """
        found: list[float] = []

        def other(value: Any, place: Any) -> Any:
            if isinstance(place, list):
                return type(value)(map(other, value, place))
            if place < 0:
                return value
            found.append(0.0 if value == 0 else 0.5 + (2 * place + which + 1) / 1009)
            return found[-1]

        places = (self.numbers[name] for name in self.names)
        return found, self._check(tuple(map(other, self._arguments, places)))

    def ranges(self, dtype: torch.dtype) -> list[tuple[float, float]]:
        """(least, most) of each number, for arithmetic in ``dtype``."""
        most = sys.float_info.max
        known = {"normalizer": (math.ulp(0.0), most)}
        known |= dict.fromkeys(("temperature", "teacher_temperature", "pool_temperature"), temperature_range(dtype))
        return [known.get(name, (-most, most)) for name in self._numbered()]

    def number_arguments(self) -> list[int]:
        """The place of each number's argument among all."""
        return [self.names.index(name) for name in self._numbered()]

    def _numbered(self) -> list[str]:
        def count(place: Any) -> int:
            return sum(map(count, place)) if isinstance(place, list) else int(place >= 0)

        return [name for name in self.names for _ in range(count(self.numbers[name]))]


def label_places(places: Places, rows: Any) -> tuple[int, int, int, int]:
    """Where labels and mask of a row problem are, -1 where they have no part in it, classes, ``ignore_index``."""
    if rows.labels is None:
        return -1, -1, 0, 0
    mask = -1 if rows.mask is None else places.tensors["mask"]
    return places.tensors["labels"], mask, rows.classes, rows.ignore_index


def each(place: Any, count: int) -> list[int]:
    """The places of ``count`` elements, of an argument that is a sequence or stands for all of them."""
    return place if isinstance(place, list) else [place] * count


class Done(NamedTuple):
    """A computed call for its node of autograd. Of a plan it is a plain tuple of the same fields.

    ``rest``: the call without the ``tensors``: a problem, or the arguments of a call that no check has made a problem.
    A plan gives None for both where no gradient is recorded, and itself, which may have a backward.
    """

    results: tuple[Any, ...]
    backend: str
    tensors: Sequence[Tensor]
    rest: Problem | tuple[Any, ...]
    plan: Any = None


class Plans(Generic[P]):
    """The plans of the public function ``op``; its arguments come as one tuple in the order of its parameters.

    ``problem_of(name, **options)`` checks them; ``numbers``: the parameters whose numbers are read in each call.
    """

    def __init__(self, op: Callable[..., Any], problem_of: Callable[..., P], numbers: Sequence[str]) -> None:
        self.op, self.problem_of, self.numbers = op.__name__, problem_of, frozenset(numbers)
        self.names = tuple(inspect.signature(op).parameters)
        self._native: Any = None
        _all.append(self)

    def check(self, arguments: tuple[Any, ...]) -> P:
        """The problem of such a call, or the error that its arguments deserve."""
        options = {k: v for k, v in zip(self.names, arguments, strict=True) if k not in NO_OPTIONS}
        return self.problem_of(self.op, **options)

    def run(self, arguments: tuple[Any, ...]) -> Any:
        """What the plan of such a call gives, see :class:`Done`; None: there is none, or the call needs its checks."""
        kept = self._native  # another thread may forget it
        return None if kept is None else kept.run(arguments)

    def learn(
        self, arguments: tuple[Any, ...], backend: str, make: Callable[..., Any] | None, *problems: Any
    ) -> tuple[Sequence[Tensor], Any] | None:
        """Keeps the native plan ``make(*problems, places)`` of a call that has passed its checks.

        ``make`` is None for a backend without plans, and gives None for a call that cannot have one. Else returns the
        tensors and the rest of the call as a plan gives them: a checkpoint compares what the first forward, which is
        checked, and the second, which runs the plan, have saved.
        """
        global _module
        if make is None or not _enabled or missing() is not None:
            return None
        kept = self._native  # another thread may forget it
        if kept is None:
            _module = native_module()
            numbers = [name in self.numbers for name in self.names]
            kept = self._native = _module.Plans(numbers, environment.USED, OPTIONS, SAVED)
        plan = kept.known(arguments)
        if plan is None:
            return None
        places = Places(self.names, self.numbers, arguments, self.check)
        if plan is False:
            plan = make(*problems, places)
            kept.learn(arguments, plan, backend)
        return None if plan is None else (places.given, _without_tensors(arguments))

    def computed(
        self,
        results: tuple[Any, ...],
        backend: str,
        problem: Problem,
        arguments: tuple[Any, ...],
        make: Callable[..., Any] | None,
        *of: Any,
    ) -> Done:
        """A call that has passed its checks, for its node of autograd; :meth:`learn` for later ones."""
        tensors, rest = self.learn(arguments, backend, make, *of) or problem.split()[::-1]
        return Done(results, backend, tensors, rest)

    def problem(self, rest: Any, tensors: Iterator[Tensor]) -> Any:
        """The problem of a :class:`Done` call; the arguments of a planned one are checked after all."""
        if isinstance(rest, Problem):
            return rest.with_tensors(tensors).check_memory()

        def filled(value: Any) -> Any:
            if value is SAVED:
                return next(tensors)
            return type(value)(map(filled, value)) if type(value) in (list, tuple) else value

        return self.check(filled(rest))

    @property
    def hits(self) -> int:
        """Calls that plans have run since the last :func:`forget`."""
        kept = self._native
        return 0 if kept is None else int(kept.hits)

    @property
    def size(self) -> int:
        kept = self._native
        return 0 if kept is None else int(kept.size)

    def forget(self) -> None:
        self._native = None


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return SAVED
    return type(value)(map(_without_tensors, value)) if type(value) in (list, tuple) else value


def native_module() -> ModuleType:
    """The native module, whose import is left to the first plan."""
    from .cpu import native

    return native()


@functools.cache
def missing() -> str | None:
    """None if this PyTorch has the table that plans need, else what it lacks."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"PyTorch {torch.__version__} has no torch.Tensor.__dlpack_c_exchange_api__"
    return None


def is_plain_one(factor: Tensor) -> bool:
    """Whether a backward may give away what it has: ``factor`` is the number 1 on a CPU, and nobody looks on.

    False also where plans have not been used.
    """
    if _module is None:
        return False
    return _module.is_plain_one(factor)  # type: ignore[no-any-return]


def enable(enabled: bool) -> bool:
    """Turns plans on or off; returns what held before."""
    global _enabled
    before, _enabled = _enabled, enabled
    forget()
    return before


def forget() -> None:
    """Every op's next call is checked in full."""
    for plans in _all:
        plans.forget()


def learned() -> int:
    """Plans that are kept now."""
    return sum(plans.size for plans in _all)


def hits() -> dict[str, int]:
    """Calls that plans have run since the last :func:`forget`, by op."""
    return {plans.op: plans.hits for plans in _all}
