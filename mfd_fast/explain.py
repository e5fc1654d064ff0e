"""mfd_fast.explain: which backend a call would run on, and why not the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .backends import NAMES, Choice, explain_choice
from .backends.protocol import OPS
from .ops.class_sharded import check_class_sharded
from .problems.checks import value_error
from .problems.linear import LinearProblem
from .problems.problem import Problem
from .problems.rows import DistillProblem


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which backend ``op(*args, **kwargs)`` runs on, the reason, and each other backend's reason.

    Nothing is computed. A call that breaks the contract raises as the op itself would, and so does a
    backend that was asked for and cannot run (:class:`~mfd_fast.BackendError`).

    >>> import torch, mfd_fast as mfd
    >>> mfd.explain(mfd.distill_loss, torch.zeros(2, 3), torch.zeros(2, 3), backend="reference").backend
    'reference'
    """
    name = getattr(op, "__name__", op)
    if not getattr(op, "__module__", "").startswith(f"{__package__}.ops.") or name not in OPS:
        raise value_error("explain", "op", name, "one of " + ", ".join(OPS))
    record = OPS[name]
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    backend, group = bound.arguments.pop("backend"), bound.arguments.pop("process_group", None)
    problem: Problem = record.check(name, **bound.arguments)
    beside: Problem | None = None
    if isinstance(problem, (DistillProblem, LinearProblem)):
        beside = problem.loss if isinstance(problem, DistillProblem) else problem
        if group is not None:
            return _of_shards(name, problem, group)
        problem = problem.rows
    return explain_choice(record.kernels, problem, backend, name, beside)


def _of_shards(name: str, problem: DistillProblem | LinearProblem, group: Any) -> Choice:
    check_class_sharded(name, problem.rows, problem.widths, group, ())
    why = "class-sharded rows (process_group) are computed in plain PyTorch"
    return Choice("reference", why, {other: why for other in NAMES if other != "reference"})
