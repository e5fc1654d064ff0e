"""Other packages' kernels, called as their documentation says. None is a dependency: ``pip install 'mfd-fast[peers]'``.

Every rival starts from what the workload starts from. One that takes log-probabilities is charged for the softmaxes
and their backward, one without a temperature for the division by it; one that may skip work is set to exact. Losses
without T² are multiplied by it, so that all compute the same number. Versions looked at: liger-kernel 0.8.5, trl
1.16.0, fla-core 0.6.0, speculators 0.9.0, cut-cross-entropy 25.1.1, torchdistill 1.1.5.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gate import Compute
from .implementation import Implementation, UnfitError
from .ops import options_of
from .workloads import Workload


def _importable(module: str, distribution: str, gpu: bool = False) -> Callable[[torch.device], str | None]:
    """Why the module cannot be used on a device, found by importing it."""

    @functools.cache
    def why(device_type: str) -> str | None:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return f"{distribution} is not installed"
        if gpu and device_type != "cuda":
            return f"{distribution} needs a GPU"
        try:
            with _warnings_are_theirs():
                importlib.import_module(module)
        except Exception as error:
            return f"{distribution} does not import here: {type(error).__name__}: {str(error).splitlines()[0]}"
        return None

    return lambda device: why(device.type)


@contextlib.contextmanager
def _warnings_are_theirs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _load(module: str) -> Any:
    with _warnings_are_theirs():
        return importlib.import_module(module)


def _soft_only(workload: Workload, *, divergences: tuple[str, ...], ops: tuple[str, ...]) -> dict[str, Any]:
    """The options, if the workload is a divergence alone that the rival has."""
    options = options_of(workload)
    if workload.op not in ops:
        raise UnfitError(f"it has no {workload.op}")
    if options["divergence"] not in divergences:
        raise UnfitError(f"it has no {options['divergence']}")
    if options["hard_weight"] or options["soft_weight"] != 1:
        raise UnfitError("it has no weighted sum with the labels' term")
    return options


# -------------------------------------------------------------------------------------------------------- Liger

_LIGER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def _liger(workload: Workload, device: torch.device) -> Compute:
    if workload.op == "linear_distill":
        return _liger_linear(workload, device)
    return _liger_logits(workload) if device.type == "cuda" else _liger_row_function(workload)


def _liger_logits(workload: Workload) -> Compute:
    """Triton kernels that start from log-probabilities (JSD, KL) or probabilities (TVD)."""
    options = _soft_only(workload, divergences=(*_LIGER_BETA, "tvd"), ops=("distill_loss",))
    liger = _load("liger_kernel.transformers")
    temperature, divergence = options["temperature"], options["divergence"]
    if divergence == "forward_kl":
        kl = liger.LigerKLDIVLoss(reduction="batchmean")
        return lambda student, teacher, labels: (  # noqa: ARG005
            temperature**2 * kl(F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1))
        )
    if divergence == "tvd":
        tvd = liger.LigerTVDLoss(reduction="batchmean")
        return lambda student, teacher, labels: (  # noqa: ARG005
            temperature**2 * tvd(F.softmax(student / temperature, -1), F.softmax(teacher / temperature, -1))
        )
    jsd = liger.LigerJSD(beta=_LIGER_BETA[divergence])
    return lambda student, teacher, labels: (  # noqa: ARG005
        temperature**2 * jsd(F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1))
    )


def _liger_row_function(workload: Workload) -> Compute:
    """On a CPU: the row function of its chunked losses, on logits (its Triton kernels do not run there)."""
    options = _soft_only(workload, divergences=tuple(_LIGER_BETA), ops=("distill_loss",))
    rows = _load("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDFunction.distillation_loss_fn
    temperature, beta = options["temperature"], _LIGER_BETA[options["divergence"]]
    return lambda student, teacher, labels: (  # noqa: ARG005
        temperature**2 * rows(student / temperature, teacher / temperature, beta=beta) / student.shape[0]
    )


def _liger_linear(workload: Workload, device: torch.device, compiled: bool = True) -> Compute:
    """Fused head and divergence: Triton on a GPU, the chunked loss on a CPU."""
    options = _soft_only(workload, divergences=tuple(_LIGER_BETA), ops=("linear_distill",))
    temperature, beta = options["temperature"], _LIGER_BETA[options["divergence"]]
    if device.type == "cuda":
        fused = _load("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=beta, temperature=temperature)
        return lambda student_hidden, student_weight, teacher_hidden, teacher_weight, labels: (  # noqa: ARG005
            temperature**2 * fused(student_hidden, student_weight, teacher_hidden, teacher_weight, None)
        )
    chunked = _load("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=compiled
    )

    def call(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None,
    ) -> Tensor:
        if labels is None:
            labels = torch.zeros(student_hidden.shape[0], dtype=torch.int64, device=student_hidden.device)
        loss: Tensor = chunked(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
        return temperature**2 * loss

    return call


def _liger_eager(workload: Workload, device: torch.device) -> Compute:
    if device.type != "cpu":
        raise UnfitError("its Triton kernels are compiled")
    return _liger_linear(workload, device, compiled=False)


# ----------------------------------------------------------------------------------------- TRL, fla, speculators


def _trl(workload: Workload, device: torch.device) -> Compute:  # noqa: ARG001
    options = _soft_only(workload, divergences=tuple(_LIGER_BETA), ops=("linear_distill",))
    divergence = _load("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    temperature, beta = options["temperature"], _LIGER_BETA[options["divergence"]]

    def call(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None,  # noqa: ARG001
    ) -> Tensor:
        rows, _ = divergence.apply(
            student_hidden, student_weight, None, teacher_hidden, teacher_weight, None, beta, temperature
        )
        mean: Tensor = temperature**2 * rows.mean()
        return mean

    return call


def _fla(workload: Workload, device: torch.device) -> Compute:  # noqa: ARG001
    options = _soft_only(workload, divergences=("forward_kl",), ops=("linear_distill",))
    fused = _load("fla.modules.fused_kl_div").fused_kl_div_loss
    t = options["temperature"]  # the heads are linear, so hidden states are divided by it
    return lambda student_hidden, student_weight, teacher_hidden, teacher_weight, labels: (  # noqa: ARG005
        t**2 * fused(student_hidden / t, teacher_hidden / t, student_weight, teacher_weight)
    )


_SPECULATORS = {
    "forward_kl": "fused_kl_div_loss",
    "reverse_kl": "fused_reverse_kl_div_loss",
    "jsd": "fused_js_div_loss",
    "tvd": "fused_tv_loss",
}


def _speculators(workload: Workload, device: torch.device) -> Compute:  # noqa: ARG001
    options = _soft_only(workload, divergences=tuple(_SPECULATORS), ops=("distill_loss",))
    rows = getattr(_speculators_module(), _SPECULATORS[options["divergence"]])
    t = options["temperature"]
    return lambda student, teacher, labels: t**2 * rows(student[None] / t, teacher[None] / t).mean()  # noqa: ARG005


@functools.cache
def _speculators_module() -> Any:
    """``losses/fused.py`` alone: the package around it imports a model zoo."""
    spec = importlib.util.find_spec("speculators")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0], "losses", "fused.py")
    stand_in = types.ModuleType("speculators.utils.util")
    stand_in.is_npu_available = lambda: False  # type: ignore[attr-defined]
    names = ("speculators", "speculators.utils", "speculators.utils.util")
    stand_ins = {name: stand_in if name == names[-1] else types.ModuleType(name) for name in names}
    previous = {name: sys.modules.get(name) for name in names}
    own = importlib.util.spec_from_file_location("mfd_fast_bench_speculators_fused", path)
    assert own is not None
    assert own.loader is not None
    module = importlib.util.module_from_spec(own)
    sys.modules.update(stand_ins)
    try:
        with _warnings_are_theirs():
            own.loader.exec_module(module)
    finally:
        for name, old in previous.items():
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old
    return module


def _speculators_missing(device: torch.device) -> str | None:
    if importlib.util.find_spec("speculators") is None:
        return "speculators is not installed"
    return None if device.type == "cuda" else "speculators needs a GPU"


# ------------------------------------------------------------------------------ cut-cross-entropy, torchdistill


def _cut_cross_entropy(workload: Workload, device: torch.device) -> Compute:
    options = options_of(workload)
    if workload.op != "linear_distill" or options["soft_weight"] or not options["hard_weight"]:
        raise UnfitError("it has the labels' term alone")
    fused = _load("cut_cross_entropy").linear_cross_entropy
    how: dict[str, Any] = {"impl": "cce", "filter_eps": None} if device.type == "cuda" else {"impl": "torch_compile"}
    weight = options["hard_weight"]
    return lambda student_hidden, student_weight, teacher_hidden, teacher_weight, labels: (  # noqa: ARG005
        weight * fused(student_hidden, student_weight, labels, **how)
    )


def _torchdistill(workload: Workload, device: torch.device) -> Compute:  # noqa: ARG001
    options = options_of(workload)
    if workload.op != "distill_loss" or options["divergence"] != "forward_kl" or not options["soft_weight"]:
        raise UnfitError("it has forward KL and labels, on logits")
    loss = _load("torchdistill.losses.mid_level").KDLoss(
        *("m", "output") * 2,
        temperature=options["temperature"],
        alpha=options["hard_weight"],
        beta=options["soft_weight"],
    )
    # Without labels it returns the soft term without T² and without its weight.
    factor = 1.0 if options["hard_weight"] else options["soft_weight"] * options["temperature"] ** 2
    return lambda student, teacher, labels: (
        factor * loss({"m": {"output": student}}, {"m": {"output": teacher}}, labels)
    )


_SCALED = "the division by the temperature"
RIVALS = (
    Implementation(
        "liger",
        "Liger",
        _liger,
        _importable("liger_kernel.chunked_loss", "liger-kernel"),
        compiles=False,
        charged="softmaxes of both sides and their backward, where its kernel starts from log-probabilities",
    ),
    Implementation(
        "liger-eager",
        "Liger, not compiled",
        _liger_eager,
        _importable("liger_kernel.chunked_loss", "liger-kernel"),
        compiles=False,
    ),
    Implementation("trl", "TRL chunked divergence", _trl, _importable("trl.kernels.chunked_divergence", "trl")),
    Implementation(
        "fla", "fla fused_kl_div", _fla, _importable("fla.modules.fused_kl_div", "fla-core", gpu=True), charged=_SCALED
    ),
    Implementation("speculators", "speculators fused", _speculators, _speculators_missing, charged=_SCALED),
    Implementation(
        "cce",
        "cut-cross-entropy, exact",
        _cut_cross_entropy,
        _importable("cut_cross_entropy", "cut-cross-entropy"),
    ),
    Implementation(
        "torchdistill",
        "torchdistill KDLoss",
        _torchdistill,
        _importable("torchdistill.losses.mid_level", "torchdistill"),
    ),
)
