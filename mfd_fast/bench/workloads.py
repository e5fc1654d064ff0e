"""A workload: an op, sizes, dtype, options, phase, and what performance it is meant to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

PHASES = ("training", "forward")  # forward + backward with a fresh gradient; forward under no_grad
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Goals:
    """Ratios of medians in one run; None where none is set.

    ``floor``: at most this many times the measured floor; ``eager``, ``compile``: at least this many times as fast;
    ``milliseconds``: at most; ``plain``: at most this many times the same op's plain call (see ``Workload.plain``);
    ``rivals``: at least this many times as fast as each of these; ``extra``: most bytes beyond the inputs;
    ``inside``: the op inside torch.compile, at least this many times as fast as torch.compile of plain PyTorch.
    """

    floor: float | None = None
    eager: float | None = None
    compile: float | None = None
    milliseconds: float | None = None
    plain: float | None = None
    rivals: Mapping[str, float] = field(default_factory=dict)
    extra: int | None = None
    inside: float | None = None


@dataclass(frozen=True)
class Workload:
    """One call to be measured. ``sizes`` and ``options`` are those of the op's record in :mod:`.ops`.

    ``plain``: options of a simpler call of the same op that is timed beside it (CE + KL beside KL alone), or another
    ``dtype`` of the same call.
    """

    op: str
    sizes: Mapping[str, int]
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    phase: str = "training"
    targets: Goals = field(default_factory=Goals)
    plain: Mapping[str, Any] | None = None
    note: str = ""

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.sizes.values()))

    @property
    def name(self) -> str:
        """``distill_loss 512x32000 float32 divergence=jsd forward``."""
        options = [f"{key}={value}" for key, value in self.options.items()]
        phase = [] if self.phase == "training" else [self.phase]
        return " ".join([self.op, self.shape, self.dtype, *options, *phase])

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": self.shape, **asdict(self)}
