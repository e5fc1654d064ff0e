"""One sample of every class of kernels: in a test of launches, not of values, they stand for the rest."""

from __future__ import annotations

from harness import OpRecord
from op_db import samples_on

#: Op -> samples. Of the row losses: the common road as a scalar, per row with statistics, the general road of
#: transforms, a divergence that needs the labels, listed classes, several teachers.
VARIANTS = {
    "distill_loss": ("plain", "per_row", "transforms", "dkd", "topk_bucket", "teachers"),
    "distill_terms": ("labels",),
    "linear_distill_loss": ("plain", "per_row"),
    "modal_pool": ("query", "everything"),
    "feature_loss": ("mse", "cosine", "taps"),
    "mfd_loss": ("plain", "per_row"),
}


def variants_on(record: OpRecord, backend: str) -> list[str]:
    """The samples of ``record`` that ``backend`` has kernels for, one of each class."""
    able = samples_on(record, backend)
    return [name for name in VARIANTS[record.name] if name in able]
