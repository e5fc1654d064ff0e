"""The battery on a GPU: tests keep their CPU tensors, the ops they call get copies on the device.

``MFD_FAST_TEST_DEVICE=cuda`` makes every public op, and eager beside it, copy its tensors to the GPU, in the layout
they have, and its results back; gradients take the same way in the other direction. Neither the interpreter nor the
emulator is asked for then. What the ops got is compared with what was sent when the test ends: inputs are never
written. ``MFD_FAST_TEST_DEVICE=cpu`` is a rehearsal of this: the device is the CPU with interpreter and emulator, which
refuse tensors that have not come this way, as those of a GPU would. Importing this module does all that, so it comes
before op_db.
"""

from __future__ import annotations

import contextvars
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: None: the battery as CI runs it.
NAME = os.environ.get("MFD_FAST_TEST_DEVICE")
ON_GPU = NAME == "cuda"
DEVICE = torch.device(NAME or "cpu")
#: Larger storages are not kept for the comparison.
MOST_KEPT = 64 << 20

_sent: list[tuple[Tensor, Tensor]] = []
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)


def _copied(t: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole storage of ``t`` on ``device``, and ``t`` as a tensor in it with the same offset and strides."""
    count = t.untyped_storage().nbytes() // t.element_size()
    whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage(), 0, (count,), (1,))
    there = torch.empty(count, dtype=t.dtype, device=device)
    there.copy_(whole)
    placed = torch.empty(0, dtype=t.dtype, device=device)
    return there, placed.set_(there.untyped_storage(), t.storage_offset(), t.size(), t.stride())


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, device: torch.device, keep: bool) -> Tensor:
        ctx.home = t.device
        there, placed = _copied(t.detach(), device)
        if keep and there.nbytes <= MOST_KEPT:
            _sent.append((there, there.clone()))
        return placed

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Move.apply(grad_output, ctx.home, False), None, None


def _tree(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    from harness import map_tensors

    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_tree(v, f) for v in value)
    return map_tensors(value, f)


def send(t: Tensor) -> Tensor:
    """The copy that an op gets; tensors of the meta device stay."""
    return t if t.device.type != "cpu" else _Move.apply(t, DEVICE, True)


def fetch(t: Tensor) -> Tensor:
    return t if t.device.type != DEVICE.type else _Move.apply(t, torch.device("cpu"), False)


def here(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` without the copies, for tensors that are on the device."""
    plain = getattr(op, "unmoved", op)
    if ON_GPU:
        return plain

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        token = _inside.set(True)
        try:
            return plain(*args, **kwargs)
        finally:
            _inside.reset(token)

    return call


def moved(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, called with CPU tensors, on the device."""

    inner = here(op)

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _tree(inner(*_tree(args, send), **_tree(kwargs, send)), fetch)

    call.unmoved = op  # type: ignore[attr-defined]
    return call


def _install() -> None:
    """Replaces the public ops, ``mfd.explain`` and the eager forms."""
    if NAME is None:
        return
    import eager

    import mfd_fast as mfd
    from mfd_fast import backends
    from mfd_fast.backends.protocol import OPS
    from mfd_fast.explain import explain

    for name in OPS:
        setattr(mfd, name, moved(getattr(mfd, name)))
        setattr(eager, name, moved(getattr(eager, name)))

    def explained(op: Any, *args: Any, **kwargs: Any) -> Any:
        return moved(explain)(getattr(op, "unmoved", op), *args, **kwargs)

    mfd.explain = explained
    if not ON_GPU:
        why_not = backends.why_not

        def refusing(name: str, op: str, problem: Any) -> str | None:
            backward = torch._C._current_graph_task_id() != -1
            if name in ("cuda", "triton") and not (_inside.get() or backward):
                return "the tensors are on cpu, not on the device"
            return why_not(name, op, problem)

        backends.why_not = refusing


def check_inputs() -> None:
    """Nobody has written into what was sent to the device since the last call."""
    sent, _sent[:] = list(_sent), []
    for there, before in sent:
        held, was = (t.view(torch.uint8) if t.dtype == torch.bool else t.view(torch.int8) for t in (there, before))
        assert torch.equal(held, was), f"an input of {there.numel()} elements was written on {there.device}"


_install()
