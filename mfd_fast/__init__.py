"""Multimodal knowledge distillation at hardware speed."""

from . import balance, nn, schedules
from .backends import BackendError, Choice, use_backend
from .explain import explain
from .ops.distill_loss import distill_loss, distill_terms
from .ops.feature_loss import feature_loss
from .ops.mfd_loss import mfd_loss
from .ops.modal_pool import modal_pool
from .types import DistillTerms, Divergence, ForwardKL, LogitTransform, MFDOutput, ModalPool

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Choice",
    "DistillTerms",
    "Divergence",
    "ForwardKL",
    "LogitTransform",
    "MFDOutput",
    "ModalPool",
    "balance",
    "distill_loss",
    "distill_terms",
    "explain",
    "feature_loss",
    "mfd_loss",
    "modal_pool",
    "nn",
    "schedules",
    "use_backend",
]
