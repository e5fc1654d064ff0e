"""Hugging Face ``kernels``: this package's layers as a repository that needs no network.

    extend(LogitsDistillationLoss)                                  # ModelOpt's class, or torchtune's ForwardKLLoss
    with use_kernel_mapping(MAPPING):
        kernelize(criterion, mode=Mode.TRAINING, device="cpu")

``criterion`` is, or contains, a module of that class. Without :func:`extend` ``kernels`` does not know it and leaves it
as it is, unless it is a class of yours decorated by ``use_kernel_forward_from_hub("LogitsDistillationLoss")``. Layers
are those of ``layers.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from . import layers
from .shared import check_signature, require

require("kernels", "0.17", "0.18")

from kernels import kernelize, replace_kernel_forward_from_hub  # noqa: E402

check_signature(kernelize, "model, mode, device, use_fallback")
check_signature(replace_kernel_forward_from_hub, "cls, layer_name, condition")

__all__ = ["MAPPING", "InstalledLayer", "extend"]


@dataclass(frozen=True)
class InstalledLayer:
    """A ``kernels`` repository whose ``load`` is an import: a layer of the installed mfd_fast."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        layer: type[nn.Module] = getattr(layers, self.layer_name)
        return layer


#: For ``use_kernel_mapping`` and ``register_kernel_mapping``.
MAPPING = {name: dict.fromkeys(("cpu", "cuda"), InstalledLayer(name)) for name in layers.__all__}


def extend(kind: type[nn.Module]) -> type[nn.Module]:
    """Names a class of another package, ``LogitsDistillationLoss`` or ``ForwardKLLoss``, for ``kernels``.

    Raises:
        ValueError: there is no layer for a class of this name.
    """
    if kind.__name__ not in layers.__all__:
        raise ValueError(f"kernels.extend: no layer for {kind.__name__}, only for {', '.join(layers.__all__)}")
    replace_kernel_forward_from_hub(kind, kind.__name__)
    return kind
