"""torch.nn.Module faces of the library: the ops as modules, and fusion modules built over them."""

from .fusion import ModalFusion
from .gated import GatedFusion
from .low_rank import LowRankFusion
from .modality_dropout import ModalityDropout
from .ops import DistillationLoss, FeatureLoss, LinearDistillationLoss, MFDLoss, ModalPool

__all__ = [
    "DistillationLoss",
    "FeatureLoss",
    "GatedFusion",
    "LinearDistillationLoss",
    "LowRankFusion",
    "MFDLoss",
    "ModalFusion",
    "ModalPool",
    "ModalityDropout",
]
