"""AutoGluon MultiModal: the soft-label and the feature loss of its distillation computed here.

    with mfd_fast.integrations.autogluon.use_mfd():
        MultiModalPredictor(...).fit(train, teacher_predictor=teacher)

The definitions are AutoGluon's: the soft-label term is *valued* as the cross-entropy −Σ p log q of both sides' logits
divided by the temperature, without T²; the feature term is the mean squared error after its adaptor. What a
configuration chooses otherwise (squared errors of logits, cosine embeddings, the hard labels' loss, softmax
regression, relations) stays AutoGluon's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..ops.distill_loss import distill_loss
from ..ops.feature_loss import feature_loss
from .shared import check_signature, replaced, require

require("autogluon.multimodal", "1.6.3", "2")

from autogluon.multimodal.constants import FEATURES, LOGITS  # noqa: E402
from autogluon.multimodal.optim.lit_distiller import DistillerLitModule as AutoGluonModule  # noqa: E402

__all__ = ["DistillerLitModule", "use_mfd"]

check_signature(AutoGluonModule._compute_loss, "self, student_output, teacher_output, label")
check_signature(AutoGluonModule._compute_soft_label_loss, "self, student_output, teacher_output")
check_signature(AutoGluonModule._compute_output_feature_loss, "self, student_output, teacher_output")

_SOFT = AutoGluonModule._compute_soft_label_loss
_FEATURE = AutoGluonModule._compute_output_feature_loss


def _sides(module: Any, student_output: Any, teacher_output: Any, name: str) -> tuple[Tensor, Tensor]:
    student = student_output[module.student_model.prefix][name].squeeze(dim=1)
    return student, teacher_output[module.teacher_model.prefix][name].squeeze(dim=1).detach()


def _is_plain(loss: Any, kind: type[nn.Module], **defaults: Any) -> bool:
    """The criterion whose arguments nobody changed."""
    return type(loss) is kind and all(getattr(loss, name) == value for name, value in defaults.items())


def _soft_label_loss(self: Any, student_output: Any, teacher_output: Any) -> Tensor:
    loss = self.soft_label_loss_func
    plain = _is_plain(loss, nn.CrossEntropyLoss, weight=None, reduction="mean", label_smoothing=0.0)
    student, teacher = _sides(self, student_output, teacher_output, LOGITS)
    if not plain or student.dim() != 2:
        return _SOFT(self, student_output, teacher_output)  # type: ignore[no-any-return]
    return distill_loss(
        student, teacher, divergence="cross_entropy", temperature=self.temperature, scale_by_temperature=False
    )


def _output_feature_loss(self: Any, student_output: Any, teacher_output: Any) -> Tensor:
    if not _is_plain(self.output_feature_loss_func, nn.MSELoss, reduction="mean"):
        return _FEATURE(self, student_output, teacher_output)  # type: ignore[no-any-return]
    student, teacher = _sides(self, student_output, teacher_output, FEATURES)
    return feature_loss(self.output_feature_adaptor(student), teacher)


class DistillerLitModule(AutoGluonModule):  # type: ignore[misc]
    """``autogluon.multimodal.optim.lit_distiller.DistillerLitModule``, a drop-in."""

    _compute_soft_label_loss = _soft_label_loss
    _compute_output_feature_loss = _output_feature_loss


def use_mfd() -> AbstractContextManager[None]:
    """AutoGluon's own module computes both terms here, for the time of a ``with``.

    Raises:
        RuntimeError: it is active already.
    """
    return replaced(
        "autogluon",
        (AutoGluonModule, "_compute_soft_label_loss", _soft_label_loss),
        (AutoGluonModule, "_compute_output_feature_loss", _output_feature_loss),
    )
