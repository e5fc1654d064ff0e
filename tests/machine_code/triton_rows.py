"""The row kernels of Triton as sm_90 machine code: executed on a call's own tensors, and counted.

python tests/machine_code/triton_rows.py [--write] [words that a case's name has ...]
python tests/machine_code/triton_rows.py --execute CALLS RESULTS

The launches are recorded from the backend itself. It takes a process without TRITON_INTERPRET: kernels that were
defined under it cannot be compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "support")]

import aot  # noqa: E402
from aot_recorder import replaced  # noqa: E402

import mfd_fast  # noqa: E402
from machine_code.cases import ROW_CASES  # noqa: E402
from machine_code.counting import (  # noqa: E402
    BYTES_PER_CLOCK,
    bound,
    counts,
    digest,
    in_column_loops,
    per_element,
)
from machine_code.launches import Launch  # noqa: E402
from machine_code.machine import Machine  # noqa: E402
from machine_code.rows import DTYPES, RowCase  # noqa: E402
from machine_code.sass import Kernel, read  # noqa: E402
from machine_code.timing import simulate  # noqa: E402
from mfd_fast.backends.protocol import RowNeeds  # noqa: E402
from mfd_fast.backends.triton import distill_loss, scale  # noqa: E402
from mfd_fast.problems.rows import check_row_loss, check_rows  # noqa: E402

#: Of the counted calls; blocks of a program of the counted scaling.
N_ROWS, SCALED_BLOCKS = 64, 8
SIZES = {"fp64": "d", "fp32": "f", "i32": "i", "i64": "q"}
SCALED = ("bfloat16", "float32")
CASES = [dataclasses.replace(case, kernels=("plain_scalar", "distill_scalar")) for case in ROW_CASES]
#: Rows of linear_distill_loss between its products.
CHUNKS = [RowCase(32000, "float32"), RowCase(32000, "float32", True), RowCase(128256, "float32")]


@functools.cache
def _read(cubin: bytes, name: str) -> Kernel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return read(path, f"^{name}$")[name]


def flat(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of every parameter that the machine code has."""
    if isinstance(types, (tuple, list)):
        for of_part, part in zip(types, values, strict=True):
            yield from flat(of_part, part)
    elif types != "constexpr":
        yield types, values


def packed(types: dict[str, Any], arguments: dict[str, Any]) -> bytes:
    """The parameters as a launch hands them over, each at a multiple of its size."""
    data = b""
    for name, of_it in types.items():
        for kind, value in flat(of_it, arguments[name]):
            word = struct.pack("<q", value.data_ptr()) if kind[0] == "*" else struct.pack(f"<{SIZES[kind]}", value)
            data += bytes(-len(data) % len(word)) + word
    return data


class Runner:
    """Takes the place of the launcher: compiles every launch and executes the programs below ``most``."""

    def __init__(self, most: int | None = None) -> None:
        self.launches: list[Launch] = []
        self._most = most

    def __call__(
        self, kernel: Any, programs: int, _device: Any, warps: int, arguments: dict[str, Any], **options: Any
    ) -> None:
        found, types = aot.compiled(kernel, arguments, 90, warps, options)
        code = _read(found.asm["cubin"], kernel.fn.__name__)
        launch = Launch(code, programs, 32 * warps, 1, found.metadata.shared)
        self.launches.append(launch)
        parameters = packed(types, arguments)
        for program in range(programs if self._most is None else min(programs, self._most)):
            machine = Machine(code, parameters, 32 * warps, programs, 1, program)
            launch.traces[program] = machine.run()


def run(case: RowCase, n_rows: int, most: int | None = None) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches of one call of the scalar loss with its gradient, and the tensors of the call."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    student, teacher = ((torch.randn(n_rows, case.classes) * 2).to(dtype) for _ in range(2))
    labels = torch.randint(0, case.classes, (n_rows,)) if case.needs_labels else None
    return launches_of(case, student, teacher, labels, most)


def launches_of(
    case: RowCase, student: Tensor, teacher: Tensor, labels: Tensor | None, most: int | None = None
) -> tuple[list[Launch], dict[str, Tensor]]:
    """`run` on given tensors."""
    divergence = mfd_fast.AlphaBeta(0.5, 0.25) if case.divergence == "alpha_beta" else case.divergence
    problem = check_rows("distill_loss", student, teacher, labels, divergence=divergence, temperature=2.0)
    hard = 0.5 if case.labels else 0.0
    loss = check_row_loss(problem, 1.0, hard, None, "mean", None)
    runner = Runner(most)
    with replaced(runner):
        value, gradient, _ = distill_loss.scalar(problem, loss, needs_grad=True, parts=False)
    tensors = {"loss": value, "gradient": gradient, "student": student, "teacher": teacher, "labels": labels}
    return runner.launches, tensors


def _launch(case: RowCase, programs: int) -> Launch:
    """Of N_ROWS rows; ``programs`` of it are executed."""
    return next(x for x in run(case, N_ROWS, programs)[0] if x.kernel.name in case.kernels)


def measure(case: RowCase) -> dict[str, Any]:
    """A record of counts.json: one program, and the time of two more rounds of all that are resident."""
    launch = _launch(case, 1)
    rows = N_ROWS // launch.grid
    return record(launch, rows, case.classes, case.bytes_per_column) | case.fields()


def _scale(dtype: str, programs: int) -> Launch:
    gradient = torch.ones(SCALED_BLOCKS * scale.BLOCK * 4, dtype=DTYPES[dtype])
    with replaced(runner := Runner(programs)), mock.patch.object(scale, "MAX_PROGRAMS", 4):
        scale.scale_gradient_(gradient, torch.tensor(0.5))
    (launch,) = runner.launches
    assert programs == 0 or bool((gradient[: scale.BLOCK] == 0.5).all())
    return launch


def scale_fields(dtype: str) -> dict[str, Any]:
    shape = [SCALED_BLOCKS * scale.BLOCK * 4]
    return {"op": "scale", "divergence": None, "labels": False, "shape": shape, "dtype": dtype}


def measure_chunk(kernel: str, case: RowCase) -> dict[str, Any]:
    """The same of a kernel between the products of a bfloat16 head (linear_distill_loss): of float32 logits and, in
    backward, a bfloat16 gradient.
    """
    n_rows, needs = 64, RowNeeds(True, False, False, False, [False])
    torch.manual_seed(0)
    student, teacher = (torch.randn(n_rows, case.classes) * 2 for _ in range(2))
    labels = torch.randint(0, case.classes, (n_rows,)) if case.needs_labels else None
    problem = check_rows("distill_loss", student, teacher, labels, divergence=case.divergence, temperature=2.0)
    upstream = torch.full((n_rows,), 1 / n_rows)
    with replaced(runner := Runner(1)):
        statistics = distill_loss.per_row(problem, terms=True).statistics
        distill_loss.per_row_backward(
            problem, statistics, upstream, upstream, needs, in_place=True, student_dtype=torch.bfloat16
        )
    launch = next(x for x in runner.launches if x.kernel.name == kernel)
    dram_bytes = 8 if kernel == "distill_rows" else 10  # two logits in; a gradient out
    found = record(launch, n_rows // launch.grid, case.classes, dram_bytes)
    return found | case.fields() | {"op": kernel, "dtype": "float32, bfloat16 gradient"}


def measure_scale(dtype: str) -> dict[str, Any]:
    """The same of a gradient multiplied by an upstream factor."""
    launch = _scale(dtype, 1)
    return record(launch, SCALED_BLOCKS, scale.BLOCK, 2 * DTYPES[dtype].itemsize) | scale_fields(dtype)


def facts(launch: Launch) -> dict[str, Any]:
    """What a record says of the launch. Equal facts mean equal counts."""
    return {
        "backend": "triton",
        "kernel": launch.kernel.name,
        "code": digest(launch.kernel),
        "registers": launch.kernel.registers,
        "shared_bytes": launch.shared_bytes,
        "threads": launch.threads,
        "cluster": 1,
        "resident_blocks": launch.resident_blocks,
        "grid_blocks": launch.grid,
    }


def record(launch: Launch, rows: int, columns: int, dram_bytes: int) -> dict[str, Any]:
    """What one program of ``rows`` costs; ``dram_bytes`` per element."""
    elements = rows * columns
    counted = counts(launch.kernel, launch.traces[0])
    resident = launch.resident_blocks
    times = [simulate(launch.kernel, launch.warps(), resident, k * resident).clocks for k in (2, 4)]
    ideal = dram_bytes / BYTES_PER_CLOCK * elements * resident * 2
    fraction, binding = bound(counted, elements, dram_bytes)
    by_class = per_element(counted, elements)
    return {
        **facts(launch),
        "instructions_per_pair": by_class.pop("total"),
        "by_class": by_class,
        "bound": round(fraction, 3),
        "bound_by": binding,
        "simulated": round(ideal / (times[1] - times[0]), 3),
        **in_column_loops(launch.kernel, launch.traces[0], rows * launch.threads // 32, elements),
    }


def main(words: list[str]) -> None:
    from machine_code.__main__ import head, kept, line, name_of, write

    keep = "--write" in words
    words = [word for word in words if not word.startswith("--")]
    document = kept()
    document["compilers"]["triton"] = f"triton {importlib.metadata.version('triton')}"
    records = {name_of(found): found for found in document["records"]}
    print(head(), flush=True)
    jobs = [(case.name, functools.partial(measure, case)) for case in CASES]
    jobs += [
        (f"chunk {case.name}", functools.partial(measure_chunk, kernel, case))
        for case in CHUNKS
        for kernel in ("distill_rows", "distill_rows_backward")
    ]
    jobs += [(f"scale {dtype}", functools.partial(measure_scale, dtype)) for dtype in SCALED]
    for name, job in jobs:
        if all(word in name.split() for word in words):
            found = job()
            records[name_of(found)] = found
            print(line(found), flush=True)
            if keep:
                write({**document, "records": list(records.values())})


def execute(calls: Path, results: Path) -> None:
    """Loss and gradient of every (case, student, teacher, labels) kept in ``calls``, by all programs."""
    found = []
    for case, student, teacher, labels in torch.load(calls, weights_only=False):
        _, tensors = launches_of(RowCase(**case), student, teacher, labels)
        found.append((tensors["loss"], tensors["gradient"]))
    torch.save(found, results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--execute"]:
        execute(*map(Path, sys.argv[2:]))
    else:
        main(sys.argv[1:])
