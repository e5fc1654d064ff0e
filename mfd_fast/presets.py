"""What other libraries mean by "the distillation loss", as keyword arguments of :func:`mfd_fast.distill_loss`.

::

    loss = mfd.distill_loss(student, teacher, labels, **mfd.presets.timm(temperature=4.0, task_loss_weight=0.3))

Every function names the library's own arguments and defaults, and the file that it reproduces. Who multiplies by
T², what "mean" divides by and which way β points is one table in ``docs/conventions.md``. Where a definition cannot
be had from one call the docstring says what is missing. Logits are ``[..., C]``, raw; those libraries take
``[N, C]``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .divergences import DKD, JSD, ForwardKL, ReverseKL
from .types import LogitTransform

__all__ = ["liger", "mdistiller", "modelopt", "timm", "torchdistill", "torchtune", "trl"]


def trl(
    beta: float = 0.5,
    temperature: float = 1.0,
    num_items_in_batch: float | Tensor | None = None,
    *,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
) -> dict[str, Any]:
    """TRL 1.16: ``GKDTrainer.generalized_jsd_loss`` and ``DistillationTrainer`` (whose default is beta=1.0).

    beta weighs the teacher: m = βp + (1−β)q; 0 is KL(p‖q), 1 is KL(q‖p). No T². Divided by the tokens whose label
    is not −100 (pass the shifted ``labels``), or by ``num_items_in_batch``. Scale and softcap as in
    ``trl/trainer/distillation_trainer.py``; the other functions are in ``trl/experimental/gkd/gkd_trainer.py``.
    """
    return {
        "divergence": JSD(beta),
        "temperature": temperature,
        "scale_by_temperature": False,
        "normalizer": num_items_in_batch,
        "student_transform": LogitTransform(scale=student_logit_scale, softcap=student_final_logit_softcapping),
        "teacher_transform": LogitTransform(scale=teacher_logit_scale, softcap=teacher_final_logit_softcapping),
    }


def liger(
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Liger-Kernel 0.8.5: ``LigerFusedLinearJSDLoss`` on the logits that its linear layers would give.

    weight_hard·CE at temperature 1 + weight_soft·JSD, both summed over the tokens that are not ``ignore_index`` and
    divided by their number. beta as in TRL. No T². Its zero-padding of a narrower student is not reproduced: the
    padding takes probability; use ``LogitTransform(classes=...)``. ``liger_kernel/chunked_loss/jsd_loss.py``.
    """
    return {
        "divergence": JSD(beta),
        "temperature": temperature,
        "scale_by_temperature": False,
        "soft_weight": weight_soft_loss,
        "hard_weight": weight_hard_loss,
        "ignore_index": ignore_index,
    }


def torchdistill(
    temperature: float,
    alpha: float | None = None,
    beta: float | None = None,
    reduction: str = "batchmean",
    *,
    standardize: bool = False,
) -> dict[str, Any]:
    """torchdistill 1.1.5: ``KDLoss``, and with ``standardize`` the soft term of ``LogitStdKDLoss``.

    α·CE + β·T²·KL, β = 1 − α by default, "batchmean" over rows. With alpha None or 0 the library returns KL alone,
    *without* T² and without β; so does this preset. ``LogitStdKDLoss`` takes CE of the logits that are not
    standardised, which is a second call: here hard_weight is 0 and β·T² is kept; add
    ``alpha * F.cross_entropy(student, labels)``. ``torchdistill/losses/mid_level.py``.

    Raises:
        ValueError: neither alpha nor beta (the library fails there, too), or another reduction.
    """
    if alpha is None and beta is None:
        raise ValueError("presets.torchdistill: alpha or beta must be given, as in KDLoss")
    reductions = {"batchmean": "mean", "sum": "sum"}
    if reduction not in reductions:
        raise ValueError(f"presets.torchdistill: reduction must be 'batchmean' or 'sum', got {reduction!r}")
    transform = LogitTransform(standardize=standardize)
    options: dict[str, Any] = {
        "divergence": ForwardKL(),
        "temperature": temperature,
        "reduction": reductions[reduction],
        "student_transform": transform,
        "teacher_transform": transform,
    }
    if not alpha:
        return options | {"scale_by_temperature": False}
    soft = 1 - alpha if beta is None else beta
    return options | {"soft_weight": soft, "hard_weight": 0.0 if standardize else alpha}


def mdistiller(
    method: str = "kd",
    *,
    temperature: float = 4.0,
    ce_weight: float | None = None,
    kd_weight: float = 0.9,
    alpha: float = 1.0,
    beta: float = 8.0,
    epoch: float | None = None,
    warmup: float = 20.0,
) -> dict[str, Any]:
    """mdistiller a08d46f: "kd" or "dkd", the sum of its two losses; both T² times, both means over rows.

    "kd": ce_weight (0.1)·CE + kd_weight·T²·KL. "dkd": ce_weight (1)·CE + min(epoch/warmup, 1)·T²·(α·TCKD + β·NCKD);
    ``epoch`` None is after the warm-up. Where the library's float32 softmax underflows (log of 0) it returns inf or
    NaN and this one the value. ``mdistiller/distillers/{KD,DKD}.py``, ``mdistiller/engine/cfg.py``.

    Raises:
        ValueError: another method.
    """
    if method == "kd":
        hard = 0.1 if ce_weight is None else ce_weight
        options: dict[str, Any] = {"divergence": ForwardKL(), "soft_weight": kd_weight, "hard_weight": hard}
    elif method == "dkd":
        ramp = 1.0 if epoch is None else min(epoch / warmup, 1.0)
        hard = 1.0 if ce_weight is None else ce_weight
        options = {"divergence": DKD(alpha, beta), "soft_weight": ramp, "hard_weight": hard}
    else:
        raise ValueError(f"presets.mdistiller: method must be 'kd' or 'dkd', got {method!r}")
    return options | {"temperature": temperature}


def modelopt(temperature: float = 1.0, reduction: str = "mean", *, classes: int | None = None) -> dict[str, Any]:
    """NVIDIA ModelOpt 0.47: ``LogitsDistillationLoss``: T²·KL without labels.

    Its default "mean" divides by rows *and classes* (``F.kl_div``'s), so ``classes`` must be given there;
    "batchmean" divides by rows, "none" is per row, "sum" the sum. Its Megatron ``LogitsKLLoss`` has no T².
    ``modelopt/torch/distill/losses.py``.

    Raises:
        ValueError: another reduction, or "mean" without ``classes``.
    """
    reductions = {"mean": "mean", "batchmean": "mean", "sum": "sum", "none": "none"}
    if reduction not in reductions:
        raise ValueError(f"presets.modelopt: reduction must be one of {', '.join(reductions)}, got {reduction!r}")
    if reduction == "mean" and classes is None:
        raise ValueError("presets.modelopt: classes must be given for reduction='mean', which divides by them")
    return {
        "divergence": ForwardKL(),
        "temperature": temperature,
        "soft_weight": 1 / classes if reduction == "mean" and classes is not None else 1.0,
        "reduction": reductions[reduction],
    }


def timm(
    temperature: float = 1.0,
    distill_loss_weight: float | None = None,
    task_loss_weight: float | None = None,
    *,
    label_smoothing: float = 0.0,
) -> dict[str, Any]:
    """timm 1.0.31: ``LogitDistillationTask`` with (label-smoothed) cross-entropy as its task.

    task_weight·CE + distill_weight·T²·KL, both means over rows. Only a task weight: the other is 1 − it; only a
    distillation weight, or neither: the others are 1. ``timm/task/distillation.py``.
    """
    hard = 1.0 if task_loss_weight is None else task_loss_weight
    soft = distill_loss_weight
    if soft is None:
        soft = 1.0 if task_loss_weight is None else 1.0 - task_loss_weight
    return {
        "divergence": ForwardKL(),
        "temperature": temperature,
        "soft_weight": soft,
        "hard_weight": hard,
        "label_smoothing": label_smoothing,
    }


def torchtune(loss: str = "forward_kl", *, kd_ratio: float = 1.0, ignore_index: int = -100) -> dict[str, Any]:
    """torchtune bd2a0fc: ``ForwardKLLoss`` or ``ReverseKLLoss``, at ``kd_ratio`` < 1 the recipes' sum with CE.

    (1 − kd_ratio)·CE + kd_ratio·KL over the tokens that are not ``ignore_index``. No temperature. Its forward "KL"
    is the cross-entropy −Σ p log q: the same gradient, and a value larger by kd_ratio times the mean entropy of the
    teacher (``distill_terms(...).teacher_entropy``). Its symmetric KL is two calls. The recipes' default kd_ratio is
    0.5. ``torchtune/modules/loss/kd_losses.py``.

    Raises:
        ValueError: another loss.
    """
    losses = {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}
    if loss not in losses:
        raise ValueError(f"presets.torchtune: loss must be 'forward_kl' or 'reverse_kl', got {loss!r}")
    return {
        "divergence": losses[loss],
        "temperature": 1.0,
        "soft_weight": kd_ratio,
        "hard_weight": 1 - kd_ratio,
        "ignore_index": ignore_index,
    }
