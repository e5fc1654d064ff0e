"""Schedules: values as functions of the step number."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..number import is_integer
from ..problems import checks as contract

_owners = WeakTensorKeyDictionary()  # value -> weak reference to its schedule


def check_number(op: str, argument: str, value: object) -> float:
    """A finite Python number."""
    if isinstance(value, Tensor) or not contract.is_number(value):
        raise contract.type_error(op, argument, value, "a number")
    contract.check_scalar(op, argument, value)
    return float(value)  # type: ignore[arg-type]


def check_count(op: str, argument: str, value: Any, least: int = 1) -> int:
    if not is_integer(value):
        raise contract.type_error(op, argument, value, "an int")
    if value < least:
        raise contract.value_error(op, argument, value, f"at least {least}")
    return int(value)


class Schedule:
    """Base: a function of the step number, :meth:`at`, and the 0-d tensor that holds its present value.

    The ops accept ``value`` wherever they accept a number, and the modules accept the schedule, too.
    :meth:`step` writes into that same tensor: a compiled step, or a module that was given it once, sees every change,
    and so does a copy of that module (``copy.deepcopy``; where module and schedule are copied together, the copies
    belong together). Step after ``backward()``: a value that autograd still needs must not change under it (PyTorch
    raises).

    Args of every schedule: ``device`` and ``dtype`` of ``value`` (put it where the logits are).

    Attributes:
        value: 0-d tensor, always the same object.
        last_step: number of the present step; starts at 0.
    """

    def __init__(self, *, device: Any = None, dtype: torch.dtype = torch.float32) -> None:
        self.last_step = 0
        self.value = torch.full((), self.at(0), device=device, dtype=dtype)
        _owners[self.value] = weakref.ref(self)

    def at(self, step: int) -> float:
        """The value at ``step`` >= 0."""
        raise NotImplementedError

    def step(self, step: int | None = None) -> Tensor:
        """Advances by one, or to ``step``; returns ``value``."""
        if step is not None:
            check_count(type(self).__name__, "step", step, least=0)
        self.last_step = self.last_step + 1 if step is None else step
        self.value.fill_(self.at(self.last_step))
        return self.value

    def __float__(self) -> float:
        return self.at(self.last_step)

    def state_dict(self) -> dict[str, int]:
        """The step number; the shape of the schedule belongs to the program."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at the step of :meth:`state_dict`, writing into the same tensor."""
        self.step(state["last_step"])

    def move(self, device: torch.device) -> None:
        """Puts ``value`` on ``device``; it stays the same object."""
        if device.type != "meta" and device != self.value.device:
            self.value.data = self.value.to(device)

    def lend(self, module: nn.Module, name: str, memo: dict[Any, Any]) -> None:
        """``module.name``, of a module that is being copied, becomes this schedule, or the copy of it in ``memo``."""
        module.__dict__[name] = memo.get(id(self), self)
        memo.setdefault(("borrowers", id(self)), []).append((module, name))

    def __deepcopy__(self, memo: dict[Any, Any]) -> Schedule:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        for module, name in memo.get(("borrowers", id(self)), ()):
            module.__dict__[name] = twin
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _owners[self.value] = weakref.ref(self)

    def __repr__(self) -> str:
        options = {k: v for k, v in vars(self).items() if k not in ("value", "last_step")}
        text = ", ".join(f"{k}={v!r}" for k, v in options.items())
        return f"{type(self).__name__}({text}): {float(self):g} at step {self.last_step}"


def schedule_of(value: Tensor) -> Schedule | None:
    """The schedule whose ``value`` this tensor is."""
    owner = _owners.get(value)
    return None if owner is None else owner()


class Constant(Schedule):
    """``amount`` at every step.

    >>> import mfd_fast as mfd
    >>> float(mfd.schedules.Constant(4.0).step())
    4.0
    """

    def __init__(self, amount: float, **options: Any) -> None:
        self.amount = check_number("Constant", "amount", amount)
        super().__init__(**options)

    def at(self, step: int) -> float:  # noqa: ARG002
        return self.amount


class Linear(Schedule):
    """start + (end − start)·k/n at step k of n = ``steps``, then ``end``.

    >>> import mfd_fast as mfd
    >>> [mfd.schedules.Linear(4.0, 1.0, steps=3).at(k) for k in range(5)]
    [4.0, 3.0, 2.0, 1.0, 1.0]
    """

    def __init__(self, start: float, end: float, steps: int, **options: Any) -> None:
        self.start, self.end = check_number("Linear", "start", start), check_number("Linear", "end", end)
        self.steps = check_count("Linear", "steps", steps)
        super().__init__(**options)

    def at(self, step: int) -> float:
        return self.end if step >= self.steps else self.start + (self.end - self.start) * step / self.steps


class Cosine(Schedule):
    """end + (start − end)·(1 + cos(π k/n))/2 at step k of n = ``steps``, then ``end``.

    Loshchilov, Hutter: SGDR, arXiv:1608.03983, one period.

    >>> import mfd_fast as mfd
    >>> [round(mfd.schedules.Cosine(4.0, 1.0, steps=2).at(k), 6) for k in range(4)]
    [4.0, 2.5, 1.0, 1.0]
    """

    def __init__(self, start: float, end: float, steps: int, **options: Any) -> None:
        self.start, self.end = check_number("Cosine", "start", start), check_number("Cosine", "end", end)
        self.steps = check_count("Cosine", "steps", steps)
        super().__init__(**options)

    def at(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * step / self.steps)) / 2


class Warmup(Schedule):
    """Rises linearly from ``start`` to what ``after`` starts with in ``steps`` steps, then follows ``after``.

    ``Warmup(1.0, steps=20)`` is min(k/20, 1): the warm-up of decoupled distillation, arXiv:2203.08679.

    Args:
        after: number, or another schedule, whose own steps begin when the warm-up ends. It is read through
            ``after.at`` only and is never stepped.

    >>> import mfd_fast as mfd
    >>> warm = mfd.schedules.Warmup(mfd.schedules.Linear(4.0, 2.0, steps=2), steps=2)
    >>> [warm.at(k) for k in range(6)]
    [0.0, 2.0, 4.0, 3.0, 2.0, 2.0]
    """

    def __init__(self, after: float | Schedule, steps: int, start: float = 0.0, **options: Any) -> None:
        self.after = after if isinstance(after, Schedule) else Constant(check_number("Warmup", "after", after))
        self.steps = check_count("Warmup", "steps", steps)
        self.start = check_number("Warmup", "start", start)
        super().__init__(**options)

    def at(self, step: int) -> float:
        if step >= self.steps:
            return self.after.at(step - self.steps)
        return self.start + (self.after.at(0) - self.start) * step / self.steps
