"""Backends and the choice between them.

Each backend is a package with ``available() -> str | None`` (None: it can run here; else the reason) and
one module per op it has kernels for. That module's ``can_run(problem) -> str | None`` answers for one call.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

import torch

from ..problems.checks import value_error
from ..problems.problem import Problem
from . import choice, environment, plans
from .protocol import OPS, FeatureBackend, MFDBackend, PoolBackend, RowBackend, ScaleBackend

NAMES = environment.BACKENDS  # best first
#: The backends of each op that has kernels, best first.
KERNELS = {op.kernels: op.backends for op in OPS.values()}

_INTERPRETED = ("triton", "cuda")
_ON_CPU = tuple(name for name in NAMES if name not in _INTERPRETED)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


@dataclass(frozen=True)
class Choice:
    """Which backend runs a call and why. ``rejected`` maps every other candidate to its reason."""

    backend: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the block on one backend; raises :class:`BackendError` where it cannot.

    The choice belongs to the present context (``contextvars``): this thread and its asyncio tasks. Threads started
    inside the block do not see it; run them in ``contextvars.copy_context()``, or set ``MFD_FAST_BACKEND``, which
    holds for the process. A backward runs on the backend of its forward, whatever the thread.

    >>> import torch, mfd_fast as mfd
    >>> with mfd.use_backend("reference"):
    ...     loss = mfd.distill_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    """
    check_name("use_backend", name)
    token = environment.USED.set(name)
    try:
        yield
    finally:
        environment.USED.reset(token)


def check_name(op: str, name: object) -> None:
    if name not in NAMES:
        raise value_error(op, "backend", name, "one of " + ", ".join(map(repr, NAMES)))


def requested(backend: str | None, op: str) -> tuple[str | None, str]:
    """The backend asked for, nearest first: argument, use_backend, MFD_FAST_BACKEND; and who asked."""
    if backend is not None:
        check_name(op, backend)
        return backend, f"backend={backend!r} was passed"
    name = environment.USED.get()
    if name is not None:
        return name, f"use_backend({name!r}) is active"
    name = environment.backend()
    if name is not None:
        return name, f"MFD_FAST_BACKEND={name}"
    return None, ""


def check_not_traced(op: str, backend: str | None) -> None:
    """torch.jit.trace would record the memory of a kernel's outputs; plain PyTorch it can record."""
    if torch.compiler.is_compiling() or not torch._C._is_tracing():
        return
    if requested(backend, op)[0] != "reference":
        raise RuntimeError(f"{op}: torch.jit.trace cannot record kernels; use torch.export or torch.compile")


def implementation(name: str, op: str) -> ModuleType:
    """The module with ``op``'s entry points on backend ``name``."""
    return _module(f"{name}.{op}")


def row_backend(name: str) -> RowBackend:
    return implementation(name, "distill_loss")  # type: ignore[return-value]


def pool_backend(name: str) -> PoolBackend:
    return implementation(name, "modal_pool")  # type: ignore[return-value]


def feature_backend(name: str) -> FeatureBackend:
    return implementation(name, "feature_loss")  # type: ignore[return-value]


def mfd_backend(name: str) -> MFDBackend:
    return implementation(name, "mfd_loss")  # type: ignore[return-value]


def scale_backend(name: str) -> ScaleBackend:
    return implementation(name, "scale")  # type: ignore[return-value]


def _module(path: str) -> ModuleType:
    module = _modules.get(path)
    if module is None:
        module = _modules[path] = importlib.import_module(f"{__name__}.{path}")
    return module


_modules: dict[str, ModuleType] = {}


def availability(name: str) -> str | None:
    """None if the backend can run on this machine, else why not."""
    reason: str | None = _module(name).available()
    return reason


def status() -> dict[str, str | None]:
    """Every backend's reason why it cannot run here, None for those that can."""
    found: dict[str, str | None] = {}
    for name in NAMES:
        try:
            found[name] = availability(name)
        except ValueError as error:  # a bad environment variable, which every call refuses
            found[name] = str(error)
    return found


def why_not(name: str, op: str, problem: Problem) -> str | None:
    """None if backend ``name`` can run this call of ``op``, else the reason."""
    reason = availability(name)
    if reason is not None:
        return reason
    if name not in KERNELS[op]:
        return f"{op} has no {name} kernel yet"
    if name == "reference":
        return None
    reason = problem.why_no_kernel()
    if reason is not None:
        return reason
    refusal: str | None = implementation(name, op).can_run(problem)
    return refusal


def _why_not_both(name: str, op: str, problem: Problem, beside: Problem | None) -> str | None:
    """:func:`why_not`, also of what the same kernels read ``beside``."""
    reason = why_not(name, op, problem)
    return reason or (None if beside is None or name == "reference" else beside.why_no_kernel())


def choose(
    op: str,
    problem: Problem,
    backend: str | None = None,
    public_name: str | None = None,
    beside: Problem | None = None,
) -> str:
    """Name of the backend that runs this call."""
    name, origin = requested(backend, public_name or op)
    if name is None:
        for name in _order(op, problem)[0]:
            if _why_not_both(name, op, problem, beside) is None:
                return name
        raise BackendError(f"{public_name or op}: no backend can run this call")
    reason = _why_not_both(name, op, problem, beside)
    if reason is not None:
        raise BackendError(f"{public_name or op}: backend {name!r} cannot run ({origin}): {reason}")
    return name


def choose_recorded(op: str, problem: Problem, backend: str | None) -> str:
    """What a compiler sees: "reference", whose operations it may fuse, where :mod:`.choice` says that an opaque op does
    not pay and no backend was asked for; else ``backend``, or "" for the registered op, which chooses when it runs.
    """
    if backend is not None or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return backend or ""
    if problem.device.type != "cpu" or _asked_for_now():
        return ""
    return "reference" if choice.is_traced(op, problem.elements) else ""


def _asked_for_now() -> bool:
    return requested(None, "")[0] is not None


#: What torch.compiler.assume_constant_result sets, which would import all of torch._dynamo.
_asked_for_now._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _order(op: str, problem: Problem) -> tuple[tuple[str, ...], str]:
    """The backends of ``op`` that need not be asked for, best first for this call, and the reason for that order."""
    if problem.device.type == "cpu":
        return _ON_CPU, "the only kernels for a CPU"
    return choice.order(op, problem.columns, KERNELS[op])


def _prefers(name: str, problem: Problem) -> bool:
    """On CPU tensors the interpreter is for checking, never for speed: it must be asked for."""
    return not (name in _INTERPRETED and problem.device.type == "cpu")


def explain_choice(
    op: str, problem: Problem, backend: str | None, public_name: str, beside: Problem | None = None
) -> Choice:
    """:func:`choose` with every reason spelled out."""
    name, origin = requested(backend, public_name)
    rejected: dict[str, str] = {}
    if name is not None:
        chosen = choose(op, problem, name, public_name, beside)
        for other in NAMES:
            if other != chosen:
                rejected[other] = _why_not_both(other, op, problem, beside) or origin
        return Choice(chosen, origin, rejected)
    chosen = choose(op, problem, None, public_name, beside)
    for other in NAMES:
        if other == chosen:
            continue
        reason = _why_not_both(other, op, problem, beside)
        if reason is None:
            interpreted = not _prefers(other, problem)
            reason = (
                "interpreted on a CPU only when asked for by name"
                if interpreted
                else choice.why_slower(op, other, chosen)
            )
        rejected[other] = reason
    said = f" ({_order(op, problem)[1]})"
    if problem.device.type == "cpu":
        traced = choice.is_traced(op, problem.elements)
        said = "; inside torch.compile a call this small is traced as the reference instead" if traced else ""
    return Choice(chosen, f"the fastest that can run on {problem.device}{said}", rejected)


def forget_availability() -> None:
    """Makes the backends look again at the machine and the environment (tests)."""
    for name in NAMES:
        getattr(_module(name).available, "cache_clear", lambda: None)()
    plans.forget()
