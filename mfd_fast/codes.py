"""Numbers that Python shares with the kernels: one table each."""

from __future__ import annotations

import torch

#: csrc/common/problems/rows.h: Dtype.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

#: csrc/common/problems/rows.h: Divergence.
DIVERGENCES = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "jsd": 2,
    "skew_kl": 3,
    "skew_reverse_kl": 4,
    "tvd": 5,
    "alpha_beta": 6,
    "dkd": 7,
    "nkd": 8,
    "cross_entropy": 9,
}

#: What a sparse teacher leaves to the classes that it does not list.
TAILS = {"bucket": 0, "renormalize": 1, "zero": 2}

#: The index of a candidate that only pads a sparse teacher's list: kPadding of csrc/common/rows/topk_math.h.
PADDING = -(2**63)

FEATURE_KINDS = {"mse": 0, "smooth_l1": 1, "cosine": 2}

#: Columns of the statistics that the per-row forward saves for the backward of the same backend: kStats of
#: csrc/common/problems/rows.h, which says what those of `cpu` hold; a backend writes 0 where it needs none.
STATISTICS = 11
