"""The regression check of CI: mfd_fast beside eager PyTorch in the same process, never an absolute time.

The bounds are a fraction of what the kernels do on a quiet machine, so that a noisy one passes and a kernel that lost
its vectorisation, its threads or its single pass does not. An op without a kernel for this device runs on the
reference, which does more than eager does (masks, by-products), and only must not fall far behind it.
"""

import pytest
import torch

from mfd_fast.bench import results
from mfd_fast.bench.measure import Settings, measure
from mfd_fast.bench.workloads import Workload

ON_THE_REFERENCE = 0.2
BOUNDS = {
    "logits": (3.0, Workload("distill_loss", {"rows": 256, "classes": 8000})),
    "logits, bfloat16": (1.5, Workload("distill_loss", {"rows": 256, "classes": 8000}, "bfloat16")),
    "short rows": (1.5, Workload("distill_loss", {"rows": 8192, "classes": 112})),
    "labels": (2.0, Workload("distill_loss", {"rows": 1024, "classes": 1000}, options={"hard_weight": 0.5})),
    "latency": (0.4, Workload("distill_loss", {"rows": 64, "classes": 100})),
    "pool": (1.0, Workload("modal_pool", {"batch": 1024, "modalities": 3, "width": 768})),
    "features": (0.7, Workload("feature_loss", {"rows": 1024, "taps": 4, "width": 768})),
    "head": (0.7, Workload("mfd_loss", {"batch": 256, "modalities": 3, "width": 512, "classes": 100})),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_not_slower_than_before(name):
    bound, workload = BOUNDS[name]
    found = measure(workload, Settings(torch.device("cpu"), against=("eager",), seconds=0.2, least=5))
    if found["backend"] == "reference":
        bound = ON_THE_REFERENCE
    assert results.primary(found) is not None, results.verdict(found)
    ratio = results.speed_up(found, "eager")
    assert ratio >= bound, f"{ratio:.2f} x as fast as eager, bound {bound}: {results.verdict(found)}"
