"""mfd_fast.explain: which backend a call would run on, and why not the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from .backends import NAMES, Choice, explain_choice
from .ops.class_sharded import check_class_sharded
from .ops.distill_loss import distill_loss
from .ops.distill_terms import distill_terms
from .ops.feature_loss import feature_loss
from .ops.linear_distill_loss import linear_distill_loss
from .ops.mfd_loss import mfd_loss
from .ops.modal_pool import modal_pool
from .problems.checks import value_error
from .problems.features import check_feature_loss
from .problems.linear import LinearProblem, check_linear_distill_loss
from .problems.mfd import check_mfd_loss
from .problems.pool import check_pool
from .problems.problem import Problem
from .problems.rows import DistillProblem, check_loss, check_rows


class Op(NamedTuple):
    """``kernels``: whose it runs, a key of ``backends.OPS``; ``check`` builds its problem from all arguments."""

    kernels: str
    check: Callable[..., Any]


#: The public ops. Their backends are those of their kernels; the records of the tests follow from this table.
OPS: dict[Callable[..., Any], Op] = {
    distill_loss: Op("distill_loss", check_loss),
    distill_terms: Op("distill_loss", check_rows),
    linear_distill_loss: Op("distill_loss", check_linear_distill_loss),
    modal_pool: Op("modal_pool", check_pool),
    feature_loss: Op("feature_loss", check_feature_loss),
    mfd_loss: Op("mfd_loss", check_mfd_loss),
}


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which backend ``op(*args, **kwargs)`` runs on, the reason, and each other backend's reason.

    Nothing is computed. A call that breaks the contract raises as the op itself would, and so does a
    backend that was asked for and cannot run (:class:`~mfd_fast.BackendError`).

    >>> import torch, mfd_fast as mfd
    >>> mfd.explain(mfd.distill_loss, torch.zeros(2, 3), torch.zeros(2, 3), backend="reference").backend
    'reference'
    """
    record = OPS.get(op)
    if record is None:
        known = ", ".join(f.__name__ for f in OPS)
        raise value_error("explain", "op", getattr(op, "__name__", op), f"one of {known}")
    kernel_op, check = record
    name = op.__name__
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    backend, group = bound.arguments.pop("backend"), bound.arguments.pop("process_group", None)
    problem: Problem = check(name, **bound.arguments)
    beside: Problem | None = None
    if isinstance(problem, (DistillProblem, LinearProblem)):
        beside = problem.loss if isinstance(problem, DistillProblem) else problem
        if group is not None:
            return _of_shards(name, problem, group)
        problem = problem.rows
    return explain_choice(kernel_op, problem, backend, name, beside)


def _of_shards(name: str, problem: DistillProblem | LinearProblem, group: Any) -> Choice:
    check_class_sharded(name, problem.rows, problem.widths, group, ())
    why = "class-sharded rows (process_group) are computed in plain PyTorch"
    return Choice("reference", why, {other: why for other in NAMES if other != "reference"})
