"""``pytest benchmarks --benchmark-only``: pytest-benchmark's view of the main workloads.

Save a run with ``--benchmark-save=NAME`` and compare a later commit with ``--benchmark-compare``. Absolute times only
compare on one quiet machine; ``python -m benchmarks --compare`` compares ratios.
"""

import pytest
import torch

from mfd_fast.bench.case import build, step_of
from mfd_fast.bench.ceilings import floor_step
from mfd_fast.bench.gate import Gate
from mfd_fast.bench.implementations import backend_choices, eager_call, mfd_fast_on
from mfd_fast.bench.ops import of

from .suites import distill, features, head, linear, pool, step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKLOADS = (
    distill(64, 100),
    distill(1024, 1000),
    distill(4096, 1000),
    distill(4096, 1000, "bfloat16"),
    distill(512, 32000),
    distill(16384, 112),
    pool(128, 2, 512),
    pool(1024, 3, 768),
    features(2048, 4, 768),
    head(64, 2, 512, 31),
    head(256, 3, 512, 100),
    linear(256, 512, 8000),
    step(256, 3, 512, 100, 1024),
)


@pytest.mark.parametrize("contestant", ["mfd_fast", "eager", "floor"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name.replace(" ", "-"))
def test_speed(benchmark, workload, contestant):
    case, op = build(workload, DEVICE), of(workload)
    benchmark.group = workload.name
    work = op.work(dict(workload.sizes), workload.torch_dtype.itemsize, True)
    if contestant == "floor":
        run = floor_step(work, workload.torch_dtype, DEVICE)
    else:
        backend, _ = backend_choices(case)
        call = eager_call(workload) if contestant == "eager" else mfd_fast_on(backend).prepare(workload, DEVICE)
        red = Gate(workload, case).check(call).red
        assert red is None, red
        run = step_of(call, case)
        benchmark.extra_info["backend"] = backend if contestant == "mfd_fast" else "eager"
    benchmark.extra_info["bytes"], benchmark.extra_info["flops"] = work.nbytes, work.flops

    def synchronized():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronized)
