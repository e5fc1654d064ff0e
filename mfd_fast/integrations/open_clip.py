"""OpenCLIP: :class:`DistillClipLoss`, the contrastive and the distillation loss of each direction in one pass.

    loss = DistillClipLoss()        # instead of open_clip.loss.DistillClipLoss

The definition is OpenCLIP's: both terms are means of the image-to-text and the text-to-image rows; the distillation
is *valued* as the cross-entropy −Σ p log q, so it is larger than KL(p‖q) by the teacher's entropy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.distill_terms import distill_terms
from .shared import check_signature, require

require("open_clip_torch", "3.3", "4")

from open_clip.loss import DistillClipLoss as OpenClipLoss  # noqa: E402

__all__ = ["DistillClipLoss"]

check_signature(
    OpenClipLoss.forward,
    "self, image_features, text_features, logit_scale, dist_image_features, dist_text_features, dist_logit_scale, "
    "output_dict",
)
check_signature(OpenClipLoss.get_logits, "self, image_features, text_features, logit_scale, logit_bias")
check_signature(OpenClipLoss.get_ground_truth, "self, device, num_logits")


class DistillClipLoss(OpenClipLoss):  # type: ignore[misc]
    """``open_clip.loss.DistillClipLoss``; arguments, gathering and results are its own.

    Raises:
        ValueError: the teacher's features or scale require grad. OpenCLIP computes them without.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Any:
        student = self.get_logits(image_features, text_features, logit_scale)
        teacher = self.get_logits(dist_image_features, dist_text_features, dist_logit_scale)
        if any(logits.requires_grad for logits in teacher):
            raise ValueError("DistillClipLoss: the teacher's features must be computed without grad")
        labels = self.get_ground_truth(image_features.device, student[0].shape[0])
        hard, soft = [], []
        for x, y in zip(student, teacher, strict=True):
            terms = distill_terms(x, y, labels)
            assert terms.hard is not None
            hard.append(terms.hard.mean())
            soft.append(terms.soft.mean() + terms.teacher_entropy.mean())
        contrastive, distill = (hard[0] + hard[1]) / 2, (soft[0] + soft[1]) / 2
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill
