"""TRL: ``DistillationTrainer``, ``GKDTrainer`` and ``GOLDTrainer`` with their divergence computed here.

    from mfd_fast.integrations.trl import GKDTrainer        # instead of trl.experimental.gkd.GKDTrainer

The definitions are TRL's: JSD(β) of the softened distributions, β weighing the teacher (0: KL(p‖q), 1: KL(q‖p)), no
T², logits scaled, then capped, then divided by the temperature.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..ops.distill_loss import distill_loss
from ..ops.linear_distill_loss import linear_distill_loss
from ..presets import trl as preset
from .shared import check_signature, item_count, replaced, require

require("trl", "1.16", "2")

from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer  # noqa: E402
from trl.experimental.gold import GOLDTrainer as TrlGOLDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

__all__ = ["DistillationTrainer", "GKDTrainer", "GOLDTrainer", "chunked_divergence_loss", "use_mfd"]

check_signature(
    distillation_trainer._chunked_divergence_loss,
    "student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, completion_mask, "
    "beta, num_items_in_batch, student_lm_head_bias, teacher_lm_head_bias, student_logit_scale, teacher_logit_scale, "
    "student_final_logit_softcapping, teacher_final_logit_softcapping, temperature",
)
check_signature(
    TrlGKDTrainer.generalized_jsd_loss,
    "student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch",
)
check_signature(
    TrlGOLDTrainer.generalized_jsd_loss,
    "student_logits, teacher_logits, labels, beta, temperature, reduction, logits_are_probs, num_items_in_batch",
)
check_signature(TrlGKDTrainer.compute_loss, "self, model, inputs, return_outputs, num_items_in_batch")
check_signature(TrlGKDTrainer.training_step, "self, model, inputs, num_items_in_batch")
check_signature(TrlGKDTrainer.generate_on_policy_outputs, "model, inputs, generation_config")
check_signature(
    distillation_trainer.DistillationTrainer._compute_loss, "self, unwrapped_student, inputs, num_items_in_batch"
)

_GOLD_JSD = TrlGOLDTrainer.generalized_jsd_loss
_GKD_JSD = TrlGKDTrainer.generalized_jsd_loss

# ------------------------------------------------------------------------------------------- from hidden states


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``trl.trainer.distillation_trainer._chunked_divergence_loss``: arguments and results are its own.

    Args:
        student_hidden_states, teacher_hidden_states: ``[B, K, H]``, each with its own H.
        student_lm_head_weight, teacher_lm_head_weight: ``[V, H]``; biases ``[V]`` or None.
        completion_mask: ``[B, K]``, not 0 where a position counts.

    Returns:
        The loss (Σ / counted positions, or / ``num_items_in_batch``), the sum of the student's entropies (nats) and
        the number of counted positions.
    """
    head = [_whole(student_lm_head_weight), _whole(student_lm_head_bias)]
    teacher_head = [_whole(teacher_lm_head_weight), _whole(teacher_lm_head_bias)]
    # A gathered master copy is float32: cast once, as TRL does.
    if head[0] is not student_lm_head_weight:
        head[0] = head[0].to(student_hidden_states.dtype)
    if teacher_head[0] is not teacher_lm_head_weight:
        teacher_head[0] = teacher_head[0].to(teacher_hidden_states.dtype)
    out = linear_distill_loss(
        student_hidden_states,
        head[0],
        teacher_hidden_states.detach(),
        teacher_head[0],
        student_bias=head[1],
        teacher_bias=teacher_head[1],
        mask=completion_mask != 0,
        **preset(
            beta,
            temperature,
            item_count(num_items_in_batch),
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_final_logit_softcapping=student_final_logit_softcapping,
            teacher_final_logit_softcapping=teacher_final_logit_softcapping,
        ),
    )
    return out.loss, out.student_entropy, out.rows


def _whole(parameter: Any) -> Any:
    """The whole of a sharded parameter (FSDP2), once for all chunks."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


_CHUNKED = (distillation_trainer, "_chunked_divergence_loss", chunked_divergence_loss)


class DistillationTrainer(distillation_trainer.DistillationTrainer):  # type: ignore[misc]
    """``trl.DistillationTrainer`` with :func:`chunked_divergence_loss`. Its loss is a global of its module, so it
    is replaced while this trainer computes one.
    """

    def _compute_loss(self, *args: Any) -> Any:
        if distillation_trainer._chunked_divergence_loss is chunked_divergence_loss:  # within use_mfd()
            return super()._compute_loss(*args)
        with replaced("trl.DistillationTrainer", _CHUNKED):
            return super()._compute_loss(*args)


# ------------------------------------------------------------------------------------------------- from logits


def _jsd_loss(
    own: Any,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    beta: float,
    temperature: float,
    reduction: str,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    classes = student_logits.shape[-1]
    options = preset(beta, temperature, item_count(num_items_in_batch))
    if num_items_in_batch is None:
        if reduction not in ("batchmean", "mean", "sum"):
            return own(student_logits, teacher_logits, labels, beta, temperature, reduction)  # type: ignore[no-any-return]
        if reduction == "sum":
            options["reduction"] = "sum"
        elif reduction == "mean":  # over the classes as well
            options["soft_weight"] = 1 / classes
        elif labels is None:  # over the first dimension, whatever the second is
            options["normalizer"] = max(student_logits.shape[0], 1)
    if labels is not None:  # no label is looked up: they only tell which rows count
        options["mask"] = labels != -100
    return distill_loss(student_logits, teacher_logits.detach(), **options)


def _gkd_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """``GKDTrainer.generalized_jsd_loss``. A reduction per element ("none") stays TRL's."""
    return _jsd_loss(_GKD_JSD, student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)


def _gold_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """``GOLDTrainer.generalized_jsd_loss``.

    Probabilities of matched tokens do not sum to 1, so no softmax gives them back: that case stays TRL's, as does a
    reduction per element.
    """
    if logits_are_probs:
        return _GOLD_JSD(  # type: ignore[no-any-return]
            student_logits, teacher_logits, labels, beta, temperature, reduction, True, num_items_in_batch
        )
    return _jsd_loss(
        _GOLD_JSD, student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
    )


class GKDTrainer(TrlGKDTrainer):  # type: ignore[misc]
    """``trl.experimental.gkd.GKDTrainer``; a drop-in unless one of the options is on.

    Args:
        apply_temperature: soften by ``args.temperature``. TRL uses it to generate only; its loss is at 1.
        count_generated_tokens: divide a batch that was generated by its tokens. TRL divides by the number of labels
            that the data set has in their place. The mean is then one of micro-batches.
    """

    generalized_jsd_loss = staticmethod(_gkd_jsd_loss)

    def __init__(
        self, *args: Any, apply_temperature: bool = False, count_generated_tokens: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._generated = False
        if count_generated_tokens:
            own = super().generate_on_policy_outputs

            def generate(*values: Any, **options: Any) -> Any:
                self._generated = True
                return own(*values, **options)

            self.generate_on_policy_outputs = generate
        if apply_temperature:

            def softened(*values: Any, **options: Any) -> Tensor:
                return _gkd_jsd_loss(*values, **{"temperature": self.temperature} | options)

            self.generalized_jsd_loss = softened

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Any:
        """The trainer's hook: generates, or does not, and computes the loss."""
        self._generated = False
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The trainer's hook."""
        if not (self._generated and num_items_in_batch is not None and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, None)
        # The Trainer takes a loss that was given a count as divided already.
        loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class GOLDTrainer(TrlGOLDTrainer):  # type: ignore[misc]
    """``trl.experimental.gold.GOLDTrainer``, a drop-in."""

    generalized_jsd_loss = staticmethod(_gold_jsd_loss)


def use_mfd() -> AbstractContextManager[None]:
    """TRL's own trainers compute their divergence here, for the time of a ``with``.

    Raises:
        RuntimeError: it is active already.
    """
    return replaced(
        "trl",
        _CHUNKED,
        (TrlGKDTrainer, "generalized_jsd_loss", staticmethod(_gkd_jsd_loss)),
        (TrlGOLDTrainer, "generalized_jsd_loss", staticmethod(_gold_jsd_loss)),
    )
