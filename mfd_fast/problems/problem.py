"""A checked call: its options without any tensor, and its tensors in one fixed order."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .checks import foreign_execution, has_memory, is_foreign, is_transformed

if TYPE_CHECKING:
    from typing_extensions import Self


class _Saved:
    """Stands where a tensor was, see :meth:`Problem.without_tensors`."""

    def __repr__(self) -> str:
        return "SAVED"


SAVED: Any = _Saved()

#: What stands in the place of a tensor most often.
_NUMBERS = frozenset({type(None), float, int})


class Problem:
    """Base of the problems. A subclass lists its attributes, in the order in which their tensors are given out.

    OPTIONS: hashable values, never a tensor, with their types in a schema of torch.library.
    SIZES: what :meth:`measure` reads off the tensors.
    TENSORS: a tensor, a number in its place, or None.
    LISTS: sequences of such values.
    PARTS: problems of which this one is made.
    ZERO: those of TENSORS whose number 0 means that a term is not computed.
    ARGUMENTS: names of arguments that are not those of the attributes, for messages.
    """

    OPTIONS: ClassVar[dict[str, str]] = {}
    SIZES: ClassVar[tuple[str, ...]] = ()
    TENSORS: ClassVar[tuple[str, ...]] = ()
    LISTS: ClassVar[tuple[str, ...]] = ()
    PARTS: ClassVar[tuple[str, ...]] = ()
    ZERO: ClassVar[tuple[str, ...]] = ()
    ARGUMENTS: ClassVar[dict[str, str]] = {}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        raise NotImplementedError

    @property
    def columns(self) -> int:
        """Length of the rows that a kernel walks along, 0 where there are several."""
        return 0

    @property
    def elements(self) -> int | None:
        """Elements of the inputs of a plain float32 call, for which tracing was measured; None for any other."""
        return None

    def __init__(self, **values: Any) -> None:
        self.__dict__ = values

    def description(self) -> tuple[Hashable, ...]:
        """What this call is apart from its tensors and the numbers in their place."""
        own = tuple(self.__dict__[name] for name in (*self.OPTIONS, *self.SIZES))
        return (type(self).__name__, *own, *(self.__dict__[name].description() for name in self.PARTS))

    def tensors(self) -> list[Tensor]:
        """Every tensor that is there."""
        return self.split()[1]

    def without_tensors(self) -> Self:
        """A copy that holds none: what a node of autograd may keep."""
        return self.split()[0]

    def split(self) -> tuple[Self, list[Tensor]]:
        """:meth:`without_tensors` and :meth:`tensors`."""
        values = self.__dict__.copy()
        found: list[Tensor] = []
        for name in self.TENSORS:
            value = values[name]
            if type(value) in _NUMBERS or not isinstance(value, Tensor):
                continue
            found.append(value)
            values[name] = SAVED
        for name in self.LISTS:
            each = values[name]
            found += [value for value in each if isinstance(value, Tensor)]
            values[name] = [SAVED if isinstance(value, Tensor) else value for value in each]
        for name in self.PARTS:
            values[name], more = values[name].split()
            found += more
        if not found:
            return self, found
        same = object.__new__(type(self))
        same.__dict__ = values
        return same, found

    def with_tensors(self, tensors: Iterator[Tensor]) -> Self:
        """A copy of what :meth:`without_tensors` has left with as many of ``tensors`` as :meth:`tensors` gave."""
        same = object.__new__(type(self))
        values = same.__dict__ = self.__dict__.copy()
        for name in self.TENSORS:
            if values[name] is SAVED:
                values[name] = next(tensors)
        for name in self.LISTS:
            values[name] = [next(tensors) if value is SAVED else value for value in values[name]]
        for name in self.PARTS:
            values[name] = values[name].with_tensors(tensors)
        return same

    def check_memory(self) -> Self:
        """This problem; RuntimeError if a tensor has lost its memory since the checks: what a backward must ask.

        Storage can be freed in between (``untyped_storage().resize_(0)``, as sharded training does), and autograd does
        not notice.
        """
        if not foreign_execution():
            for name, value in self.named_tensors():
                if not is_foreign(value) and not has_memory(value):
                    raise RuntimeError(f"{name} was freed between forward and backward: its storage has no memory now")
        return self

    def measure(self) -> None:
        """Sets the SIZES."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some attributes exchanged."""
        same = object.__new__(type(self))
        same.__dict__ |= self.__dict__ | changes
        return same

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor with the name of its argument, in the order of :meth:`tensors`."""
        values = self.__dict__
        found: list[tuple[str, Any]] = [(self.ARGUMENTS.get(name, name), values[name]) for name in self.TENSORS]
        for name in self.LISTS:
            argument = self.ARGUMENTS.get(name, name)
            found += [(self.member(argument, k), value) for k, value in enumerate(values[name])]
        for name in self.PARTS:
            found += values[name].named_tensors()
        return [(name, value) for name, value in found if isinstance(value, Tensor)]

    def member(self, argument: str, index: int) -> str:
        """The name of an element of a list."""
        return f"{argument}[{index}]"

    def why_no_kernel(self) -> str | None:
        """None if kernels can read these tensors, else the reason."""
        if self._has_foreign():
            name, value = next((name, t) for name, t in self.named_tensors() if is_foreign(t))
            return f"{name} is a {type(value).__name__}, which has no memory that a kernel could read"
        if is_transformed():
            return "a transform of torch.func or a forward derivative looks into every operation"
        return None

    def _has_foreign(self) -> bool:
        values = self.__dict__
        for name in self.TENSORS:
            value = values[name]
            if type(value) is not Tensor and type(value) not in _NUMBERS and is_foreign(value):
                return True
        for name in self.LISTS:
            for value in values[name]:
                if type(value) is not Tensor and type(value) not in _NUMBERS and is_foreign(value):
                    return True
        return any(values[name]._has_foreign() for name in self.PARTS)
