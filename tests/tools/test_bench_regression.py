"""The regression check of CI: mfd_fast beside eager PyTorch in the same process, never an absolute time.

The bounds are a fraction of what the kernels do on one quiet core, so that a noisy machine passes and a kernel that
lost its vectorisation or its single pass does not; a regression is there every time, so the best of five counts.
An op without a kernel for this device runs on the reference, which does more than eager does (masks, by-products), and
only must not fall far behind it.
"""

import pytest
import torch

from mfd_fast.bench import results
from mfd_fast.bench.measure import Settings, measure
from mfd_fast.bench.workloads import Workload

ON_THE_REFERENCE = 0.2
BOUNDS = {
    "logits": (3.0, Workload("distill_loss", {"rows": 64, "classes": 8000})),
    "logits, bfloat16": (1.5, Workload("distill_loss", {"rows": 64, "classes": 8000}, "bfloat16")),
    "short rows": (1.5, Workload("distill_loss", {"rows": 2048, "classes": 112})),
    "labels": (2.0, Workload("distill_loss", {"rows": 512, "classes": 1000}, options={"hard_weight": 0.5})),
    "latency": (0.4, Workload("distill_loss", {"rows": 64, "classes": 100})),
    "pool": (1.0, Workload("modal_pool", {"batch": 256, "modalities": 3, "width": 768})),
    "features": (0.7, Workload("feature_loss", {"rows": 128, "taps": 4, "width": 768})),
    "head": (0.7, Workload("mfd_loss", {"batch": 128, "modalities": 3, "width": 256, "classes": 50})),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.rest
def test_not_slower_than_before(name):
    bound, workload = BOUNDS[name]
    best = 0.0
    for _ in range(5):
        found = measure(workload, Settings(torch.device("cpu"), against=("eager",), seconds=0.1, least=5))
        assert results.primary(found) is not None, results.verdict(found)
        bound = ON_THE_REFERENCE if found["backend"] == "reference" else bound
        best = max(best, results.speed_up(found, "eager"))
        if best >= bound:
            break
    assert best >= bound, f"{best:.2f} x as fast as eager, bound {bound}: {results.verdict(found)}"
