"""Multimodal knowledge distillation at hardware speed."""

from . import balance, nn, presets, schedules
from .backends import BackendError, Choice, use_backend
from .divergences import (
    DKD,
    JSD,
    NKD,
    TVD,
    AlphaBeta,
    CrossEntropy,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from .explain import explain
from .ops.distill_loss import distill_loss
from .ops.distill_terms import distill_terms
from .ops.feature_loss import feature_loss
from .ops.linear_distill_loss import linear_distill_loss
from .ops.mfd_loss import mfd_loss
from .ops.modal_pool import modal_pool
from .types import DistillOutput, DistillTerms, LinearDistillOutput, LogitTransform, MFDOutput, ModalPoolOutput, TopK

__version__ = "0.1.0"

__all__ = [
    "DKD",
    "JSD",
    "NKD",
    "TVD",
    "AlphaBeta",
    "BackendError",
    "Choice",
    "CrossEntropy",
    "DistillOutput",
    "DistillTerms",
    "Divergence",
    "ForwardKL",
    "LinearDistillOutput",
    "LogitTransform",
    "MFDOutput",
    "ModalPoolOutput",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TopK",
    "balance",
    "distill_loss",
    "distill_terms",
    "explain",
    "feature_loss",
    "linear_distill_loss",
    "mfd_loss",
    "modal_pool",
    "nn",
    "presets",
    "schedules",
    "use_backend",
]
