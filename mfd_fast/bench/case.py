"""The tensors of a workload, at full size and as the small block that the correctness gate knows exactly.

The rows of a large workload repeat one block of at most ``BLOCK`` elements. Each copy is memory of its own, so the
timing does not change, and the exact float64 result of the block is the exact result of the whole: a mean over rows
stays what it is, the gradients of its rows are divided by the number of copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .eager import NEED_LABELS
from .ops import Arguments, BenchOp, of, options_of
from .workloads import Workload

BLOCK = 1 << 20  # elements of the widest row argument


@dataclass
class Case:
    """``arguments`` with leaves that require grad; ``upstream`` is the gradient of a result that is not a scalar."""

    workload: Workload
    arguments: Arguments
    leaves: dict[str, Tensor]
    upstream: Tensor | None
    copies: int

    @property
    def nbytes(self) -> int:
        """Of all inputs."""
        return sum(t.numel() * t.element_size() for t in tensors(self.arguments).values())


def map_tensors(tree: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """``f`` of every tensor in a tree of dicts and lists."""
    if isinstance(tree, Tensor):
        return f(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, f) for key, value in tree.items()}
    return [map_tensors(value, f) for value in tree] if isinstance(tree, list) else tree


def tensors(arguments: Arguments) -> dict[str, Tensor]:
    """``student``, ``features[0]``, …: every tensor among the arguments."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, list):
            found.update({f"{name}[{i}]": v for i, v in enumerate(value)})
    return found


def block_rows(rows: int, width: int, limit: int) -> int:
    """The largest divisor of ``rows`` with at most ``limit`` elements in ``width`` columns, at least 1."""
    most = max(1, limit // max(width, 1))
    return next((k for k in range(min(rows, most), 0, -1) if rows % k == 0), 1)


def _widest_row(op: BenchOp, sizes: dict[str, int]) -> int:
    return max((size for key, size in sizes.items() if key != op.batch), default=1)


def build(
    workload: Workload,
    device: torch.device,
    distance: str = "far",
    seed: int = 0,
    *,
    whole: bool = True,
    limit: int | None = None,
) -> Case:
    """The case at full size, or its block alone; ``limit`` replaces ``BLOCK``."""
    op, sizes = of(workload), dict(workload.sizes)
    rows = sizes[op.batch]
    block = block_rows(rows, _widest_row(op, sizes), BLOCK if limit is None else limit)
    arguments = op.inputs({**sizes, op.batch: block}, workload.torch_dtype, distance, seed)
    if not _uses_labels(options_of(workload)) and "labels" in arguments:
        arguments["labels"] = None
    copies = rows // max(block, 1) if whole else 1
    upstream = None
    if not op.mean:
        shape = (block, sizes["width"])
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(workload.torch_dtype)
        upstream = _repeat(upstream, copies).to(device)
    placed = {
        name: map_tensors(value, lambda t, n=name: (_repeat(t, copies) if n in op.rows else t).to(device))  # type: ignore[misc]
        for name, value in arguments.items()
    }
    return _with_leaves(Case(workload, placed, {}, upstream, copies), op)


def as_float64(case: Case) -> Case:
    """The same block in float64."""
    return as_dtype(case, torch.float64)


def as_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same case with leaves of its own."""
    cast = map_tensors(case.arguments, lambda t: t.detach().to(dtype) if t.is_floating_point() else t)
    upstream = None if case.upstream is None else case.upstream.to(dtype)
    return _with_leaves(Case(case.workload, cast, {}, upstream, case.copies), of(case.workload))


def _with_leaves(case: Case, op: BenchOp) -> Case:
    named = {name: value for name, value in case.arguments.items() if name in op.leaves}
    case.leaves = {name: t.requires_grad_() for name, t in tensors(named).items()}
    return case


def _repeat(t: Tensor, copies: int) -> Tensor:
    return t.repeat(copies, *(1,) * (t.dim() - 1)) if copies > 1 else t


def _uses_labels(options: dict[str, Any]) -> bool:
    return options.get("hard_weight", 1.0) != 0 or options.get("divergence") in NEED_LABELS


def training_step(f: Callable[..., Tensor], case: Case) -> Callable[[], None]:
    """Forward, backward into fresh gradients, and their release."""
    leaves = tuple(case.leaves.values())

    def step() -> None:
        f(**case.arguments).backward(case.upstream)
        for leaf in leaves:
            leaf.grad = None

    return step


def forward_step(f: Callable[..., Tensor], case: Case) -> Callable[[], None]:
    """The value alone, under no_grad."""

    def step() -> None:
        with torch.no_grad():
            f(**case.arguments)

    return step


def step_of(f: Callable[..., Tensor], case: Case) -> Callable[[], None]:
    return (training_step if case.workload.phase == "training" else forward_step)(f, case)


def value_and_gradients(f: Callable[..., Tensor], case: Case) -> dict[str, Tensor]:
    """The result and, in training, the gradient of every leaf."""
    if case.workload.phase != "training":
        with torch.no_grad():
            return {"result": f(**case.arguments)}
    result = f(**case.arguments)
    gradients = torch.autograd.grad(result, list(case.leaves.values()), case.upstream)
    return {"result": result.detach(), **{f"d {name}": g for name, g in zip(case.leaves, gradients, strict=True)}}
