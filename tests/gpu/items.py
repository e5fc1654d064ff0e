"""What the processes of `make gpu` work through, part by part: name -> a function that returns its line's fields.

On a CPU, in a rehearsal, fake_cuda plays the GPU and everything is small.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sanitizer
from worker import Items, Said, left_out, outcome_of

#: Row lengths of the smoke test, one on every rung of the kernels, and rows of each.
RUNGS = {130: 64, 1100: 64, 8191: 32, 32000: 16, 128256: 8, 10**6 + 3: 4}
SMALL_RUNGS = {130: 4}
DTYPES = ("bfloat16", "float32")
TIMED = {"seconds": 0.8, "least": 10}
#: Of the comparison: names of implementations.
RIVALS = ("eager", "compile", "liger")


def of(part: str, device: str, share: str, until: float) -> Items:
    """The items of one process, in the order of their worth."""
    backend, _, fraction = share.partition(":")
    index, count = map(int, fraction.split("/"))
    if part == "sanitizer":
        found: Items = sanitizer.items(device, until)
    else:
        rehearsal = device == "cpu"
        if rehearsal:
            rehearse()
        made = {"facts": facts, "smoke": smoke, "speed": speed, "compare": compare}[part]
        found = made(rehearsal, backend)
    return dict(list(found.items())[index::count])


def rehearse() -> None:
    """The CPU plays the GPU; few draws, and nothing is compiled by torch.compile."""
    import fake_cuda
    import torch

    from mfd_fast.bench import gate

    fake_cuda.install()
    torch.set_num_threads(1)
    gate.SEEDS, gate.SMALL_BLOCK = 2, 600
    torch.compile = lambda f, **_: f  # type: ignore[assignment]


def gpu() -> Any:
    import torch

    return torch.device("cuda")


# ------------------------------------------------------------------------------------------------------- facts


def facts(rehearsal: bool, _: str) -> Items:
    return {"machine": machine, "ceilings": functools.partial(ceilings, 64 if rehearsal else 1)}


def machine() -> Said:
    import torch

    from mfd_fast import backends
    from mfd_fast.bench import machine

    found = machine.facts(gpu())
    found["compute_capability"] = list(torch.cuda.get_device_capability())
    found["neighbours"] = None
    found["commit"] = os.environ.get("MFD_GPU_COMMIT") or found["commit"]
    found["name"] = machine.slug(found)
    found["backends"] = backends.status()
    found["clocks"] = nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu")
    lacking = [f"{name}: {why}" for name, why in found["backends"].items() if why and name in ("cuda", "triton")]
    return outcome_of("; ".join(lacking), result=found)


def nvidia_smi(fields: str) -> dict[str, str] | None:
    """As it reports them now; None where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    values = done.stdout.strip().split("\n")[0].split(", ")
    return dict(zip(fields.split(","), values, strict=False)) if done.returncode == 0 else None


def ceilings(scale: int) -> Said:
    from mfd_fast.bench import ceilings

    return outcome_of("", result=ceilings.measure(gpu(), seconds=2.0 / scale, scale=scale))


# ------------------------------------------------------------------------------------------------------- smoke


def smoke_workloads(rungs: dict[int, int], dtypes: Sequence[str]) -> list[Any]:
    """The forward KL with labels on every rung, then every other op and divergence on some."""
    from benchmarks import suites

    classes = list(rungs)
    middle, long = classes[len(classes) // 4], classes[-2 if len(classes) > 1 else 0]
    small = len(rungs) == 1
    rows = functools.partial(min, 4) if small else int
    found = [suites.distill(rungs[c], c, options={"hard_weight": 0.5}) for c in classes]
    found += [suites.terms(rungs[c], c) for c in classes[::2]]
    found += [suites.pool(rows(64), 3, width) for width in ((64,) if small else (768, 4096))]
    found += [suites.features(rows(64), 2, 64 if small else 768, options={"kind": k}) for k in ("mse", "cosine")]
    found += [suites.head(rows(64), 3, 64, 31), *([] if small else [suites.head(64, 3, 768, 1000)])]
    found += [suites.distill(rungs[c], c, options={"divergence": d}) for d in ("jsd", "dkd") for c in {middle, long}]
    found += [suites.topk(rungs[c], c, 64) for c in sorted({middle, classes[len(classes) // 2]})]
    return [replace(workload, dtype=dtype) for dtype in dtypes for workload in found]


def smoke(rehearsal: bool, backend: str) -> Items:
    found = smoke_workloads(SMALL_RUNGS if rehearsal else RUNGS, DTYPES[:1] if rehearsal else DTYPES)
    return {f"{workload.name} on {backend}": functools.partial(judge, workload, backend) for workload in found}


def judge(workload: Any, backend: str) -> Said:
    """Value and gradients against float64, by the rule that eager's error sets."""
    from mfd_fast import check

    (said,) = check.judged(workload, {backend: gpu()})
    wrong = "" if said.verdict == "right" else f"{said.verdict}: {said.why}"
    return outcome_of(wrong, error=said.error, eager_error=said.eager_error)


# ------------------------------------------------------------------------------------------- speed and comparison


def timed(rehearsal: bool) -> list[Any]:
    from benchmarks import suites

    found = [entry.workload for entry in suites.GPU_FIRST.entries]
    if not rehearsal:
        return found
    small = {"rows": 4, "batch": 4, "classes": 30, "width": 32, "taps": 2}
    cut = [replace(w, sizes={k: min(v, small.get(k, v)) for k, v in w.sizes.items()}) for w in found]
    return list({w.name: w for w in cut}.values())[:2]


def speed(rehearsal: bool, _: str) -> Items:
    """mfd_fast on every backend, eager, the floor."""
    return {w.name: functools.partial(measured, w, rehearsal, ("eager",), False) for w in timed(rehearsal)}


def compare(rehearsal: bool, _: str) -> Items:
    """The same beside torch.compile, Liger and CUDA graphs."""
    return {w.name: functools.partial(measured, w, rehearsal, RIVALS, True) for w in timed(rehearsal)}


def measured(workload: Any, rehearsal: bool, against: Sequence[str], graphs: bool) -> Said:
    """With ``graphs`` launches are counted too."""
    from mfd_fast.bench import measure

    options = {"seconds": 0.0, "least": 2} if rehearsal else TIMED
    try:
        settings = measure.Settings(gpu(), against, launches=graphs, graphs=graphs, **options)
        found = measure.measure(workload, settings)
    except measure.LeftOutError as reason:
        return left_out(str(reason))
    return outcome_of("; ".join(wrong_in(found)), result=found)


def wrong_in(found: dict[str, Any]) -> list[str]:
    """What is red or failed of mfd_fast itself; a rival's failure is its own."""
    red = [f"{m['title']}: {m['red']}" for m in found["measurements"] if m["red"] and "mfd_fast" in m["name"]]
    failed = [f"{n}: {why}" for n, why in found["left_out"].items() if "mfd_fast" in n and not why.startswith("out of")]
    return red + failed
