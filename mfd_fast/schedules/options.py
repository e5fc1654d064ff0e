"""Options of modules: checked when they are set, registered with ``torch.nn.Module`` where they are tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .schedule import Schedule, schedule_of

#: ``check(op, name, value)`` raises what the op itself would raise.
Check = Callable[[str, str, Any], Any]


class OptionsModule(nn.Module):
    """Base of the modules that hold options of an op, each as an attribute of the option's name.

    A ``Parameter`` becomes a parameter of the module and any other tensor a buffer: optimizers, ``.to()`` and
    ``state_dict`` see them. A :class:`Schedule`, or its ``value``, stays the caller's: the module reads it at every
    call. ``.to()`` moves it to another device and leaves its dtype alone; a copy of the module follows the same
    schedule, unless the schedule is copied along with it. Setting the attribute later changes the option.
    """

    #: Name of every option, and its check.
    _OPTIONS: ClassVar[Mapping[str, Check]] = {}
    _given: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The options that were set, as the op gets them."""
        return {name: _present_value(getattr(self, name)) for name in self._given}

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._OPTIONS:
            super().__setattr__(name, value)
            return
        if isinstance(value, Tensor):
            value = schedule_of(value) or value
        self._OPTIONS[name](type(self).__name__, name, _present_value(value))
        if name in self._given:
            delattr(self, name)
        else:
            self._given = (*self._given, name)
        if isinstance(value, Sequence) and any(isinstance(one, Tensor) for one in value):
            value = TensorList(value)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)
        if isinstance(value, Tensor):
            _remember(self, name, value)

    def reset_parameters(self) -> None:
        """Gives tensor options the values they were set with.

        Raises:
            RuntimeError: an option was set on the meta device, where it has no value.
        """
        for name in self._given:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                _restore(self, name, value)
            elif isinstance(value, TensorList):
                value.reset_parameters()

    def __deepcopy__(self, memo: dict[Any, Any]) -> OptionsModule:
        schedules = {name: v for name, v in self.__dict__.items() if isinstance(v, Schedule)}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        rest = {name: v for name, v in self.__dict__.items() if name not in schedules}
        twin.__setstate__(copy.deepcopy(rest, memo))
        for name, schedule in schedules.items():
            schedule.lend(twin, name, memo)
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for value in self.__dict__.values():
            if isinstance(value, Schedule):
                value.move(fn(value.value.new_empty(0)).device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_text(getattr(self, name))}" for name in self._given)


class TensorList(nn.Module):
    """A sequence of numbers and tensors, the tensors registered by their place: ``weight.0``."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__()
        self.numbers = {str(k): value for k, value in enumerate(values) if not isinstance(value, Tensor)}
        self.length = len(values)
        for k, value in enumerate(values):
            if isinstance(value, nn.Parameter):
                self.register_parameter(str(k), value)
            elif isinstance(value, Tensor):
                self.register_buffer(str(k), value)
            if isinstance(value, Tensor):
                _remember(self, str(k), value)

    def values(self) -> list[Any]:
        names = map(str, range(self.length))
        return [self.numbers[name] if name in self.numbers else getattr(self, name) for name in names]

    def reset_parameters(self) -> None:
        """As :meth:`OptionsModule.reset_parameters`."""
        for k, value in enumerate(self.values()):
            if isinstance(value, Tensor):
                _restore(self, str(k), value)

    def __repr__(self) -> str:
        return "[" + ", ".join(map(_text, self.values())) + "]"


def _present_value(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.value
    return value.values() if isinstance(value, TensorList) else value


def _remember(module: nn.Module, name: str, value: Tensor) -> None:
    """What ``reset_parameters`` restores: the first value that is one."""
    initial: dict[str, Tensor] = module.__dict__.setdefault("_initial", {})
    if not value.is_meta and (name not in initial or initial[name].shape != value.shape):
        initial[name] = value.detach().cpu().clone()


def _restore(module: nn.Module, name: str, value: Tensor) -> None:
    initial: dict[str, Tensor] = module.__dict__.get("_initial", {})
    if name not in initial:
        raise RuntimeError(
            f"{type(module).__name__}: {name} was set on the meta device and has no value to restore; "
            "load a state_dict, or set it from a number"
        )
    with torch.no_grad():
        value.copy_(initial[name])


def _text(value: object) -> str:
    return repr(value.detach()) if isinstance(value, Tensor) else repr(value)
