"""The launches of modal_pool that test_triton_aot_fusion.py compiles: recorded from the wrapper itself."""

from __future__ import annotations

from typing import Any

import torch
from aot_distill_loss import each
from aot_recorder import Launch, recorded

from mfd_fast.backends.protocol import PoolNeeds
from mfd_fast.backends.triton import modal_pool
from mfd_fast.problems.pool import check_pool

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = [f"pool_backward-4x1024-bf16-{cc}" for cc in (80, 90, 100)]
NAMES += [f"pool_backward-{shape}-90" for shape in ("3x768-fp32", "8x8192-bf16", "16x256-fp32", "4x1024-fp64")]
NAMES += ["pool_forward-4x1024-bf16-90", "pool_forward-8x8192-bf16-80", "reduce_columns-4x1024-bf16-90"]
EACH = each(NAMES)


def launches(name: str) -> Launch:
    """(kernel, arguments, capability, warps, options) of the launch called ``kernel-MxD-dtype-capability``."""
    return recorded(name.split("-")[0], int(name.split("-")[-1]), lambda: _run(*name.split("-")[1:3]))


def variants(name: str) -> list[Launch]:
    """The same launch with other numbers; all must use one compiled kernel."""
    kernel, shape, dtype, capability = name.split("-")
    changes: list[dict[str, Any]] = [{}, {"temperature": 7.5}, {"n": 17, "scale": 0.3}, {"n": 1}]
    changes.append({"skipped": 1})
    return [recorded(kernel, int(capability), lambda c=c: _run(shape, dtype, **c)) for c in changes]


def _run(shape: str, dtype_name: str, n: int = 2, **options: Any) -> None:
    """Every option and, in backward, every gradient: the launches that need most registers."""
    count, width = map(int, shape.split("x"))
    dtype = DTYPES.get(dtype_name, torch.float64)
    skipped = options.pop("skipped", 0)
    features = [torch.zeros(n, width, dtype=dtype) for _ in range(count)]
    present = torch.ones(n + skipped, count, dtype=torch.bool)[skipped:]
    vectors = {"query": torch.zeros(width + skipped, dtype=dtype)[skipped:], "bias": torch.zeros(count, dtype=dtype)}
    problem = check_pool("aot", features, present=present, **vectors, **{"temperature": 0.5, **options})
    pooled, weights = modal_pool.forward(problem)
    modal_pool.backward(problem, weights, pooled, weights, PoolNeeds(True, False, True, False, [True] * count))
