"""What the adapters share: labels, vocabularies, versions, hooks."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import LogitTransform

__all__ = ["align_vocabulary", "check_signature", "item_count", "replaced", "require", "shift_labels"]


# ------------------------------------------------------------------------------------- labels and vocabularies


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels of the next token: position i gets the label of i + 1, the last one ``ignore_index``.

    The logits of position i predict token i + 1. Moving the labels (8 bytes a token) instead of cutting the last
    position off the logits leaves those where they are: no view that a later reshape copies, no gradient to pad.

    Args:
        labels: ``[..., S]`` integers.
        ignore_index: what stands where there is no next token.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        TypeError: not an integer tensor of at least one dimension.

    >>> import torch
    >>> shift_labels(torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    if not isinstance(labels, Tensor) or labels.dim() < 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"shift_labels: labels must be an integer tensor [..., S], got {labels!r:.80}")
    if labels.shape[-1] == 0:
        return labels.clone()
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def align_vocabulary(student_classes: int, teacher_classes: int) -> tuple[LogitTransform, LogitTransform]:
    """``student_transform`` and ``teacher_transform`` that restrict both sides to the classes that both have.

    For vocabularies that differ by padding at the end (151936 and 152064, say): the padded columns are not read, take
    no probability and get a zero gradient. It does not map one tokenizer to another.

    Args:
        student_classes, teacher_classes: width of the logits of either side, >= 1.

    Raises:
        ValueError: a width that is not an integer >= 1.

    >>> student, teacher = align_vocabulary(151936, 152064)
    >>> student.classes, teacher.classes
    (151936, 151936)
    """
    for side, classes in (("student", student_classes), ("teacher", teacher_classes)):
        if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
            raise ValueError(f"align_vocabulary: {side}_classes must be an integer >= 1, got {classes!r}")
    shared = min(student_classes, teacher_classes)
    return LogitTransform(classes=shared), LogitTransform(classes=shared)


def item_count(count: Any) -> Any:
    """A trainer's ``num_items_in_batch`` as a ``normalizer``: floating, 0-d; None and numbers as they are."""
    if not isinstance(count, Tensor):
        return count
    # Under DataParallel a trainer repeats the one number for its devices.
    return count.reshape(-1)[0].to(torch.promote_types(count.dtype, torch.float32))


# ------------------------------------------------------------------------------------------ versions and hooks


def require(package: str, at_least: str, below: str) -> None:
    """The installed ``package`` (its name on PyPI) must have ``at_least <= version < below``.

    Raises:
        ImportError: it is not installed, or another version is; names what was found and what is needed.

    >>> require("torch", "2.9", "3")
    """
    needed = f"{package}>={at_least},<{below}"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"mfd_fast.integrations: {package} is not installed, needed is {needed}") from None
    if not _release(at_least) <= _release(found) < _release(below):
        raise ImportError(f"mfd_fast.integrations: found {package} {found}, needed is {needed}")


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without trailing zeros: "1.16.0rc1" is (1, 16)."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in found.group().split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_signature(function: Callable[..., Any], parameters: str) -> None:
    """The parameters of a trainer's hook must be the ones that an adapter was written for.

    Args:
        function: the trainer's.
        parameters: names in their order, ``*`` and ``**`` before the ones that collect.

    Raises:
        ImportError: they are others; names the function, what was found and what is needed.

    >>> check_signature(lambda student, teacher, **options: None, "student, teacher, **options")
    """
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = ", ".join(stars.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values())
    if found != parameters:
        name = f"{function.__module__}.{function.__qualname__}"
        raise ImportError(f"mfd_fast.integrations: {name} takes ({found}), this adapter needs ({parameters})")


_active: set[str] = set()


@contextmanager
def replaced(trainer: str, *targets: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of modules or classes, ``(owner, name, value)``, for the time of a ``with``.

    What was there comes back, also after an exception.

    Raises:
        RuntimeError: this trainer's attributes are replaced already.
    """
    if trainer in _active:
        raise RuntimeError(f"mfd_fast.integrations.{trainer}.use_mfd() is active already; it does not nest")
    # vars, not getattr: a static method must come back as one.
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in targets]
    _active.add(trainer)
    try:
        for owner, name, value in targets:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        _active.discard(trainer)
