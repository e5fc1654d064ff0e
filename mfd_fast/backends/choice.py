"""Which of a GPU's backends runs a call: measured results where there are any, else the byte and launch model.

The model of an op on a backend: ``launches * LAUNCH_US + passes * (bytes of one pass) / BYTES_PER_US``, in
microseconds. Its inputs:

- ``LAUNCH_US``: what one launch costs the host. CUDA C++ is taken to launch in about 2 us, Triton's launcher in 10 to
  20, of which the middle is taken; neither was measured here. It decides small shapes.
- ``BYTES_PER_US``: the 4.3 TB/s that a copy is taken to move on an H200 (docs/predictions.md).
- ``READ_ONCE``: rows of at most so many bytes of each side are held on the chip and read once, longer ones twice. The
  CUDA kernels park a row pair in the shared memory of up to 8 blocks on sm_90 and sm_100 (227 KiB each), of one block
  elsewhere (99 KiB at least); a Triton program of 8 warps holds 32 bytes of each side in each thread, so 8 KiB
  (``choose_blocks``). It decides long rows.

No GPU has measured anything yet, so ``MEASURED`` is empty and the order is that of ``OPS``, which the model confirms
(``tests/backends/test_choice.py``). A measured exception is one line here, with its file in ``benchmarks/results``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LAUNCH_US = {"cuda": 2.0, "triton": 15.0}
BYTES_PER_US = 4.3e6
READ_ONCE = {"cuda": 8 * 227 * 1024 // 2, "triton": 8 * 1024}
READ_ONCE_WITHOUT_CLUSTERS = 99 * 1024 // 2


class Measured(NamedTuple):
    """``backends``, best first, for rows of ``columns`` (least, most) columns of ``op``; ``file`` has the evidence."""

    op: str
    columns: tuple[int, int]
    backends: tuple[str, ...]
    file: str


MEASURED: tuple[Measured, ...] = ()


def order(op: str, columns: int, usual: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The backends of ``op``, best first, and where that is known from."""
    for entry in MEASURED:
        if entry.op == op and entry.columns[0] <= columns <= entry.columns[1]:
            rest = tuple(name for name in usual if name not in entry.backends)
            return (*entry.backends, *rest), f"measured: benchmarks/results/{entry.file}"
    return usual, "by the launch and byte model, no GPU has measured it"


def model_us(backend: str, rows: int, columns: int, itemsize: int, *, clusters: bool = True) -> float:
    """Microseconds of a row loss and its gradient: two reads and a write, the reads twice for rows that do not fit.

    ``rows`` of ``columns`` classes of ``itemsize`` bytes; ``clusters``: on a GPU that has them.
    """
    held = READ_ONCE[backend] if clusters or backend != "cuda" else READ_ONCE_WITHOUT_CLUSTERS
    passes = 3 if columns * itemsize <= held else 5
    return LAUNCH_US[backend] + passes * rows * columns * itemsize / BYTES_PER_US


def why_slower(op: str, name: str, chosen: str) -> str:
    """Of two backends of a GPU, in a sentence for :func:`mfd_fast.explain`."""
    if name not in LAUNCH_US or chosen not in LAUNCH_US:
        return f"slower than {chosen}"
    reason = f"slower than {chosen}: a launch costs {LAUNCH_US[name]:g} us against {LAUNCH_US[chosen]:g}"
    if op == "distill_loss":
        reason += (
            f"; rows of more than {READ_ONCE[name] // 1024} KiB a side are read twice, against "
            f"{READ_ONCE[chosen] // 1024} KiB"
        )
    return reason


# ------------------------------------------------------------------------------------------------ torch.compile

#: Under torch.compile on a CPU, up to so many elements of the inputs (Problem.elements), an opaque op costs more than
#: its kernel saves: the reference is traced, and Inductor fuses it with its neighbours. These are the largest shapes
#: that were measured to gain: a step of forward and backward with one operation before the op, float32, one thread,
#: AVX-512, least times, opaque / traced: distill_loss 64x100 1.28 (256x1000: 0.57), modal_pool 128x2x512 1.47,
#: feature_loss of 4 taps 64x256 1.54, mfd_loss 64x2x512x31 1.94.
TRACED_ELEMENTS = {
    "distill_loss": 2 * 64 * 100,
    "modal_pool": 128 * 2 * 512,
    "feature_loss": 2 * 4 * 64 * 256,
    "mfd_loss": 64 * 2 * 512 + 31 * 512 + 64 * 31,
}


def is_traced(op: str, elements: int | None) -> bool:
    """Whether torch.compile on a CPU sees the reference in place of an opaque op; sizes left open never decide it."""
    if elements is None or op not in TRACED_ELEMENTS:
        return False
    small = elements <= TRACED_ELEMENTS[op]
    if not torch.compiler.is_compiling():
        return small
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(small))
