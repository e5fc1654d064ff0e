"""Lightning: :class:`Teacher` holds a teacher inside a LightningModule.

    self.teacher = Teacher(model)                                         # in __init__
    return mfd.distill_loss(self(x), self.teacher(x), y, hard_weight=0.5)  # in training_step

A teacher that is a plain attribute is saved into every checkpoint, given to the optimizer by ``self.parameters()``,
reduced by DDP and put into training mode with the student.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .shared import require

require("lightning", "2.6", "3")

__all__ = ["Teacher"]


class Teacher(nn.Module):
    """A frozen model that moves with its owner, and is otherwise not part of it.

    It stays in evaluation mode, runs without autograd, and has no parameters, buffers or state dict; ``.to()`` and
    the like reach it.

    Args:
        model: the teacher; its parameters no longer require grad.

    Raises:
        TypeError: not a module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Teacher: model must be a torch.nn.Module, got {type(model).__name__}")
        # In a tuple, where nn.Module does not look for submodules.
        self._hidden = (model.requires_grad_(False).eval(),)

    @property
    def model(self) -> nn.Module:
        """The teacher itself."""
        return self._hidden[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Teacher:
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's output; evaluation mode again, should anyone have changed it."""
        with torch.no_grad():
            return self.model.eval()(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{type(self.model).__name__}, frozen"
