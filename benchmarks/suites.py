"""The suites: which workloads, against whom, with what targets. The first workloads matter most; time may run out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from mfd_fast.backends import cpu
from mfd_fast.backends.products import WIDENED_BYTES
from mfd_fast.bench.workloads import Goals, Workload
from mfd_fast.problems.linear import default_chunk_rows

BASELINES = ("eager", "compile")
LOGITS_RIVALS = ("eager", "compile", "liger", "torchdistill")
HEAD_RIVALS = ("eager", "compile", "liger", "liger-eager", "trl")
GPU_COMPILED = ("eager", "compile", "compile-max", "compile-graph")


@dataclass(frozen=True)
class Entry:
    """A workload and its contestants."""

    workload: Workload
    against: tuple[str, ...] = BASELINES


@dataclass(frozen=True)
class Suite:
    """``minutes`` and ``compile_seconds`` bound the whole suite, ``seconds`` the timing of one workload."""

    name: str
    device: str
    entries: tuple[Entry, ...]
    seconds: float
    least: int
    minutes: float
    compile_seconds: float


def distill(rows: int, classes: int, dtype: str = "float32", **more: Any) -> Workload:
    return Workload("distill_loss", {"rows": rows, "classes": classes}, dtype, **more)


def terms(rows: int, classes: int, dtype: str = "float32", **more: Any) -> Workload:
    return Workload("distill_terms", {"rows": rows, "classes": classes}, dtype, **more)


def topk(rows: int, classes: int, listed: int, dtype: str = "float32", **more: Any) -> Workload:
    return Workload("topk_loss", {"rows": rows, "classes": classes, "listed": listed}, dtype, **more)


def pool(batch: int, modalities: int, width: int, dtype: str = "float32", **more: Any) -> Workload:
    return Workload("modal_pool", {"batch": batch, "modalities": modalities, "width": width}, dtype, **more)


def features(rows: int, taps: int, width: int, dtype: str = "float32", **more: Any) -> Workload:
    return Workload("feature_loss", {"rows": rows, "taps": taps, "width": width}, dtype, **more)


def head(batch: int, modalities: int, width: int, classes: int, dtype: str = "float32", **more: Any) -> Workload:
    sizes = {"batch": batch, "modalities": modalities, "width": width, "classes": classes}
    return Workload("mfd_loss", sizes, dtype, **more)


def linear(rows: int, hidden: int, teacher: int, classes: int, dtype: str = "float32", **more: Any) -> Workload:
    """``hidden``, ``teacher``: widths of the hidden states."""
    sizes = {"rows": rows, "hidden": hidden, "teacher": teacher, "classes": classes}
    return Workload("linear_distill", sizes, dtype, **more)


def head_memory(rows: int, hidden: int, teacher: int, classes: int, dtype: str = "float32") -> int:
    """Bytes that linear_distill_loss may hold on a CPU: float32 gradients, two chunks of logits, of a 16-bit head the
    widened part of a weight; statistics, terms and labels of each row, and a few matrices [chunk, width].
    """
    chunk = default_chunk_rows(classes, torch.float32, torch.device("cpu"))
    widened = 0 if dtype == "float32" else WIDENED_BYTES
    small = 160 * rows + 3 * 4 * chunk * max(hidden, teacher)
    return 4 * (rows + classes) * hidden + 2 * 4 * chunk * classes + widened + small


def step(batch: int, modalities: int, width: int, classes: int, inputs: int, dtype: str = "float32") -> Workload:
    sizes = {"batch": batch, "modalities": modalities, "width": width, "classes": classes, "inputs": inputs}
    return Workload("student_step", sizes, dtype)


def fusion(op: str, batch: int, wide: int, narrow: int, width: int, dtype: str = "float32") -> Workload:
    return Workload(op, {"batch": batch, "wide": wide, "narrow": narrow, "width": width}, dtype)


def both(workload: Workload, against: tuple[str, ...] = BASELINES) -> list[Entry]:
    """In float32 and bfloat16, with the same ratios as targets."""
    return [Entry(replace(workload, dtype=dtype), against) for dtype in ("float32", "bfloat16")]


# The targets of the CPU: two cores with AVX-512; ratios of medians in one run.
_CPU_TABLE = [
    *both(distill(512, 32000, targets=Goals(floor=2.0, compile=5, eager=20)), LOGITS_RIVALS),
    *both(distill(2048, 32000, targets=Goals(floor=2.0, compile=5, eager=30))),
    *both(distill(4096, 1000, targets=Goals(floor=1.4, compile=4, eager=9)), LOGITS_RIVALS),
    *both(distill(65536, 112, targets=Goals(floor=1.8, compile=4, eager=7))),
    *both(distill(64, 100, targets=Goals(milliseconds=0.06, eager=3, compile=4)), LOGITS_RIVALS),
    *both(pool(1024, 3, 768, targets=Goals(floor=1.7, compile=2, eager=3.5))),
    *both(pool(4096, 4, 1024, targets=Goals(floor=1.7, compile=3.5, eager=10))),
    *both(pool(128, 2, 512, targets=Goals(eager=3, compile=3))),
    *both(head(64, 2, 512, 31, targets=Goals(eager=3, compile=2))),
    *both(head(256, 3, 512, 100, targets=Goals(eager=3, compile=2))),
    *both(head(1024, 3, 768, 1000, targets=Goals(floor=1.1, compile=1))),
    *both(features(2048, 4, 768)),
]
_AS_KL = Goals(plain=1.6)
_PLAIN_KL = {"divergence": "forward_kl"}
_CPU_VARIANTS = [
    Entry(distill(512, 32000, options={"hard_weight": 0.5}, targets=Goals(plain=1.1), plain={"hard_weight": 0.0})),
    Entry(distill(4096, 1000, options={"hard_weight": 0.5}, targets=Goals(plain=1.1), plain={"hard_weight": 0.0})),
    *(
        Entry(distill(4096, 1000, options={"divergence": name}, targets=_AS_KL, plain=_PLAIN_KL), LOGITS_RIVALS)
        for name in ("jsd", "reverse_kl", "dkd")
    ),
    *(
        Entry(distill(512, 32000, options={"divergence": name}, targets=_AS_KL, plain=_PLAIN_KL), ("eager", "liger"))
        for name in ("jsd", "reverse_kl", "dkd")
    ),
    *(
        Entry(distill(*sizes, options={"divergence": name}, targets=_AS_KL, plain=_PLAIN_KL), ("eager",))
        for sizes in ((4096, 1000), (512, 32000))
        for name in ("skew_kl", "skew_reverse_kl", "tvd", "alpha_beta", "nkd")
    ),
    *both(topk(4096, 1000, 64, targets=Goals(floor=1.3)), ("eager",)),
    *both(topk(512, 32000, 64, targets=Goals(floor=1.3)), ("eager",)),
    Entry(terms(4096, 1000), ("eager",)),
]
_CPU_SHAPES = [
    *(
        Entry(distill(rows, classes))
        for rows, classes in (
            (1024, 1000),  # ImageNet
            (64, 128256),  # Llama 3
            (256, 100),  # CIFAR-100
            (65536, 21),  # dense prediction
            (512, 30522),  # BERT
            (65536, 150),
            (64, 151936),  # Qwen
            (32, 256000),  # Gemma
        )
    ),
    *(Entry(distill(rows, classes, "bfloat16"), ("eager",)) for rows, classes in ((64, 128256), (32, 256000))),
    Entry(distill(4096, 1000, "float16")),
    Entry(distill(512, 32000, "float16"), ("eager",)),
    Entry(pool(64, 2, 512)),
    Entry(pool(16384, 4, 1024), ("eager",)),
    Entry(features(8192, 12, 1024), ("eager",)),
    *(Entry(features(2048, 4, 768, options={"kind": kind}), ("eager",)) for kind in ("smooth_l1", "cosine")),
    Entry(features(64, 4, 256)),  # latency
    *both(step(256, 3, 512, 100, 1024)),
    *both(fusion("modal_fusion", 4096, 768, 128, 512)),
    *both(fusion("low_rank_fusion", 1024, 256, 64, 128)),
]
_CPU_FORWARD = [
    Entry(distill(4096, 1000, phase="forward"), LOGITS_RIVALS),
    Entry(distill(512, 32000, phase="forward"), ("eager", "liger")),
    Entry(pool(1024, 3, 768, phase="forward")),
    Entry(head(256, 3, 512, 100, phase="forward")),
]

CPU = Suite("cpu", "cpu", (*_CPU_TABLE, *_CPU_VARIANTS, *_CPU_SHAPES, *_CPU_FORWARD), 3.0, 5, 14.0, 420.0)

_CHUNKED = {"liger": 2.5, "liger-eager": 2.5, "trl": 2.5}
_SHORT, _WIDE, _LABELS = (512, 512, 1024, 32000), (1024, 512, 512, 32000), (1024, 512, 0, 32000)
_LARGE = (1024, 512, 512, 128256)


def _head_targets(sizes: tuple[int, int, int, int], dtype: str = "float32", **more: Any) -> Goals:
    return Goals(floor=1.15, extra=head_memory(*sizes, dtype), **more)


def _narrow_head(sizes: tuple[int, int, int, int]) -> Workload:
    """bfloat16 beside float32: no slower where the processor multiplies pairs of bfloat16, 1.15 times elsewhere."""
    native = cpu.available() is None and cpu.native().has_pair_product()
    targets = Goals(plain=1.0 if native else 1.15, extra=head_memory(*sizes, "bfloat16"))
    return linear(*sizes, "bfloat16", targets=targets, plain={"dtype": "float32"})


def _heads() -> tuple[Entry, ...]:
    return (
        Entry(linear(*_SHORT, targets=_head_targets(_SHORT, rivals=_CHUNKED)), HEAD_RIVALS),
        Entry(linear(*_WIDE, targets=_head_targets(_WIDE, rivals=_CHUNKED)), HEAD_RIVALS),
        Entry(
            linear(
                *_LABELS,
                options={"soft_weight": 0.0, "hard_weight": 1.0},
                targets=_head_targets(_LABELS, rivals={"cce": 1.0}),
            ),
            ("eager", "compile", "cce"),
        ),
        Entry(_narrow_head(_SHORT), ("eager",)),
        Entry(_narrow_head(_WIDE), ("eager", "liger-eager", "trl")),
        Entry(linear(*_LARGE, targets=_head_targets(_LARGE)), ("eager",)),
    )


#: From hidden states: seconds a call.
HEADS = Suite("heads", "cpu", _heads(), 3.0, 5, 14.0, 420.0)

_INSIDE = (*BASELINES, "mfd_fast:inside")
_STEP = Goals(inside=1.0)
#: What the instruction sets differ in, and calls so short that the kernel is not the cost: MFD_FAST_CPU_ISA=avx2.
ISA = Suite(
    "isa",
    "cpu",
    (
        Entry(distill(64, 100, targets=Goals(eager=2.5, inside=1.0)), (*_INSIDE, "liger")),
        Entry(pool(128, 2, 512, targets=Goals(eager=2.5, compile=2, inside=1.0)), _INSIDE),
        Entry(features(64, 4, 256, targets=Goals(eager=2, inside=1.0)), _INSIDE),
        *both(head(64, 2, 512, 31, targets=Goals(eager=3, compile=1.8, inside=1.0)), _INSIDE),
        *both(head(256, 3, 512, 100, targets=Goals(compile=1.8)), _INSIDE),
        *both(head(1024, 3, 768, 1000, targets=Goals(compile=1.05)), _INSIDE),
        Entry(distill(65536, 112, targets=Goals(floor=1.8, compile=4))),
        Entry(distill(20000, 101)),
        Entry(distill(65536, 21)),
        Entry(distill(4096, 1000, targets=Goals(floor=1.4, compile=4)), ("compile",)),
        *both(distill(512, 32000, targets=Goals(floor=2.0, eager=10))),
        Entry(distill(2048, 32000, targets=Goals(floor=2.0)), ("compile",)),
        Entry(distill(777, 50257, targets=Goals(floor=2.0)), ("compile",)),
        *both(replace(step(100, 3, 32, 10, 32), targets=_STEP), _INSIDE),
        *both(replace(step(64, 2, 512, 31, 512), targets=_STEP), _INSIDE),
        *both(replace(step(256, 3, 512, 100, 1024), targets=_STEP), _INSIDE),
        *both(replace(step(1024, 3, 768, 1000, 1024), targets=_STEP), _INSIDE),
    ),
    1.0,
    5,
    14.0,
    420.0,
)

QUICK = Suite(
    "cpu-quick",
    "cpu",
    (
        Entry(distill(4096, 1000, targets=Goals(floor=1.4, compile=4, eager=9)), LOGITS_RIVALS),
        Entry(distill(64, 100, targets=Goals(milliseconds=0.06, eager=3, compile=4))),
        Entry(distill(512, 32000, targets=Goals(floor=2.0, eager=20)), ("eager", "liger")),
        Entry(distill(512, 32000, "bfloat16", targets=Goals(floor=2.0, eager=20)), ("eager", "liger")),
        Entry(pool(1024, 3, 768, targets=Goals(floor=1.7, eager=3.5)), ("eager",)),
        Entry(head(256, 3, 512, 100, targets=Goals(eager=3, compile=2))),
        Entry(features(2048, 4, 768), ("eager",)),
        Entry(distill(4096, 1000, options={"divergence": "jsd"}, targets=_AS_KL, plain=_PLAIN_KL), ("eager",)),
    ),
    0.8,
    3,
    1.6,
    50.0,
)

# H200: shares of the floor, bfloat16. Nothing here has a published figure before a GPU has measured it.
_GPU_LOGITS = (*GPU_COMPILED, "liger", "speculators", "torchdistill")
_GPU_HEAD = (*GPU_COMPILED, "liger", "trl", "fla", "cce")
GPU = Suite(
    "gpu",
    "cuda",
    (
        *(
            Entry(distill(rows, classes, "bfloat16", targets=Goals(floor=1 / 0.85, eager=2, compile=2)), _GPU_LOGITS)
            for rows, classes in ((8192, 128256), (16384, 32000), (8192, 151936), (4096, 256000), (8192, 30522))
        ),
        *(
            Entry(distill(rows, classes, "bfloat16", targets=Goals(eager=5, compile=2)), _GPU_LOGITS)
            for rows in (256, 1024, 8192)
            for classes in (10, 100, 1000)
        ),
        Entry(distill(65536, 150, "bfloat16"), _GPU_LOGITS),
        Entry(distill(8192, 32000, "float32"), _GPU_LOGITS),
        Entry(distill(8192, 32000, "float16"), _GPU_LOGITS),
        *(
            Entry(distill(8192, 32000, "bfloat16", options={"divergence": name}, plain=_PLAIN_KL), _GPU_LOGITS)
            for name in ("jsd", "reverse_kl", "tvd", "dkd")
        ),
        Entry(pool(16384, 4, 1024, "bfloat16", targets=Goals(floor=1 / 0.8)), GPU_COMPILED),
        Entry(pool(16384, 4, 1024, "bfloat16", phase="forward", targets=Goals(floor=1 / 0.85)), GPU_COMPILED),
        Entry(pool(1024, 3, 768, "bfloat16"), GPU_COMPILED),
        Entry(features(8192, 12, 1024, "bfloat16", targets=Goals(floor=1 / 0.8)), GPU_COMPILED),
        *(
            Entry(head(*sizes, "bfloat16", targets=Goals(eager=8, compile=1.5)), GPU_COMPILED)
            for sizes in ((64, 2, 512, 31), (256, 3, 512, 100), (1024, 3, 768, 1000))
        ),
        Entry(linear(8192, 4096, 4096, 128256, "bfloat16", targets=Goals(floor=1 / 0.85)), _GPU_HEAD),
        Entry(
            linear(8192, 4096, 0, 128256, "bfloat16", options={"soft_weight": 0.0, "hard_weight": 1.0}),
            ("eager", "compile", "cce"),
        ),
        Entry(step(1024, 3, 768, 1000, 1024, "bfloat16"), GPU_COMPILED),
    ),
    2.0,
    20,
    8.0,
    200.0,
)

#: The first minutes on a GPU: the shapes that decide most, in that order.
GPU_FIRST = Suite(
    "gpu-first",
    "cuda",
    (
        Entry(distill(8192, 128256, "bfloat16", targets=Goals(floor=1 / 0.85, eager=2, compile=2))),
        Entry(distill(16384, 32000, "bfloat16", targets=Goals(floor=1 / 0.85, eager=2, compile=2))),
        Entry(distill(8192, 1000, "bfloat16", options={"hard_weight": 0.5}, targets=Goals(eager=5, compile=2))),
        Entry(distill(1024, 100, "bfloat16", targets=Goals(eager=5, compile=2))),
        Entry(pool(16384, 4, 1024, "bfloat16", targets=Goals(floor=1 / 0.8))),
        Entry(features(8192, 12, 1024, "bfloat16", targets=Goals(floor=1 / 0.8))),
        Entry(head(1024, 3, 768, 1000, "bfloat16", targets=Goals(eager=8, compile=1.5))),
        Entry(head(64, 2, 512, 31, "bfloat16", targets=Goals(eager=8, compile=1.5))),
        Entry(distill(16384, 32000, "bfloat16", options={"divergence": "jsd"}, targets=_AS_KL, plain=_PLAIN_KL)),
        Entry(distill(16384, 32000, "bfloat16", options={"divergence": "dkd"}, targets=_AS_KL, plain=_PLAIN_KL)),
    ),
    0.8,
    10,
    2.0,
    100.0,
)

SUITES = {suite.name: suite for suite in (CPU, QUICK, HEADS, ISA, GPU, GPU_FIRST)}
