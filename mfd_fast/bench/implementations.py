"""What is measured: mfd_fast on each backend, eager PyTorch, torch.compile, and rivals (:mod:`.rivals`).

A new implementation is one record: a name, why it may be missing, and a function that turns a workload into a call.
"""

from __future__ import annotations

import torch

from .. import backends
from .case import Case
from .gate import Compute
from .implementation import Implementation, UnfitError
from .ops import of, options_of
from .rivals import RIVALS
from .workloads import Workload


def eager_call(workload: Workload) -> Compute:
    op, options = of(workload), options_of(workload)
    divergence = options.get("divergence")
    if divergence is not None:
        from .eager import DIVERGENCES

        if divergence not in DIVERGENCES:
            raise UnfitError(f"nobody's eager form of {divergence!r} is recorded here")
    return lambda **arguments: op.eager(**arguments, **options)


def _compiled(workload: Workload, mode: str | None) -> Compute:
    return torch.compile(eager_call(workload), dynamic=False, mode=mode)  # type: ignore[no-any-return]


def _graphed(workload: Workload, _: torch.device) -> Compute:
    compiled = _compiled(workload, "reduce-overhead")

    def call(**arguments: object) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(**arguments)

    return call


def _gpu_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "it is for GPUs"


def _no_compiler(device: torch.device) -> str | None:
    from torch._inductor import cpp_builder

    try:
        if device.type == "cpu":
            cpp_builder.get_cpp_compiler()
    except Exception as error:
        return f"torch.compile finds no C++ compiler ({type(error).__name__})"
    return None


INSIDE = "mfd_fast:inside"


def _inside(workload: Workload, _: torch.device) -> Compute:
    return torch.compile(of(workload).call(options_of(workload), None), dynamic=False)


BASELINES = (
    Implementation("eager", "eager PyTorch", lambda workload, _: eager_call(workload)),
    Implementation(
        "compile", "torch.compile", lambda workload, _: _compiled(workload, None), _no_compiler, compiles=True
    ),
    Implementation(
        "compile-max",
        "torch.compile, max-autotune",
        lambda workload, _: _compiled(workload, "max-autotune-no-cudagraphs"),
        _gpu_only,
        compiles=True,
    ),
    Implementation(INSIDE, "mfd_fast inside torch.compile", _inside, _no_compiler, strict=True, compiles=True),
    Implementation("compile-graph", "torch.compile, CUDA graphs", _graphed, _gpu_only, compiles=True),
)


def mfd_fast_on(backend: str) -> Implementation:
    """The public op on one backend."""

    def prepare(workload: Workload, _: torch.device) -> Compute:
        return of(workload).call(options_of(workload), backend)

    title = f"mfd_fast ({backend})"
    return Implementation(f"mfd_fast:{backend}", title, prepare, strict=True)


def backend_choices(case: Case) -> tuple[str, dict[str, str]]:
    """The backend that the library picks, and why each other one is not measured ("" where it can be).

    Raises TypeError or ValueError where this version of the op does not know the options.
    """
    op, options = of(case.workload), options_of(case.workload)
    choice = op.choice(case.arguments, options, None)
    others: dict[str, str] = {}
    for name in backends.NAMES:
        if name == choice.backend:
            continue
        try:
            op.choice(case.arguments, options, name)
        except backends.BackendError as error:
            others[name] = str(error).split("): ", 1)[-1]
            continue
        slow = name in ("triton", "cuda") and next(iter(case.leaves.values())).device.type == "cpu"
        others[name] = "it is interpreted on a CPU, for checking" if slow else ""
    return choice.backend, others


def every() -> dict[str, Implementation]:
    """All baselines and rivals by name."""
    return {record.name: record for record in (*BASELINES, *RIVALS)}
