"""``mfd-fast check``: every op on every backend that can run here, forward and backward, against float64.

The judge is the correctness gate of ``mfd-fast bench`` (:mod:`mfd_fast.bench.gate`): no error may exceed what eager
PyTorch's allows in the same dtype, for a teacher far from the student and for one near it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import backends
from .backends.protocol import OPS
from .bench import case, gate, machine
from .bench.command import device_of
from .bench.ops import of, options_of
from .bench.workloads import Workload

SECONDS = 20.0
#: Exit statuses.
RIGHT, WRONG, LATE = 0, 1, 2
#: (op of the benchmarks, sizes, options): one of every public op, then the others. A row loss meets short rows, rows
#: of a thousand classes and a vocabulary: kernels differ by the length of the row.
CASES: tuple[tuple[str, Mapping[str, int], Mapping[str, Any]], ...] = (
    ("distill_loss", {"rows": 64, "classes": 1000}, {"hard_weight": 0.5}),
    ("distill_terms", {"rows": 64, "classes": 1000}, {}),
    ("linear_distill", {"rows": 64, "hidden": 64, "teacher": 96, "classes": 1000}, {}),
    ("modal_pool", {"batch": 64, "modalities": 3, "width": 768}, {}),
    ("feature_loss", {"rows": 64, "taps": 4, "width": 768}, {}),
    ("mfd_loss", {"batch": 64, "modalities": 3, "width": 256, "classes": 100}, {}),
    ("distill_loss", {"rows": 64, "classes": 100}, {}),
    ("distill_loss", {"rows": 8, "classes": 32000}, {}),
    ("distill_loss", {"rows": 64, "classes": 1000}, {"divergence": "jsd"}),
    ("distill_loss", {"rows": 64, "classes": 1000}, {"divergence": "dkd"}),
    ("topk_loss", {"rows": 64, "classes": 1000, "listed": 64}, {}),
    ("feature_loss", {"rows": 64, "taps": 2, "width": 768}, {"kind": "cosine"}),
)
DTYPES = ("float32", "bfloat16")
#: Of eager's error, to the backend that is plain PyTorch as eager is, in another order: its probabilities come from
#: log-probabilities, which costs its float32 gradient of a near teacher up to 1.5 times eager's error.
LENIENCE = {"reference": 2.0}


@dataclass(frozen=True)
class Outcome:
    """One workload on one backend: ``verdict`` is right, wrong, cannot (the backend refuses it) or late.

    ``error`` and ``eager_error`` are the largest errors of the gradients against float64.
    """

    op: str
    workload: str
    dtype: str
    backend: str
    device: str
    verdict: str
    why: str = ""
    error: float | None = None
    eager_error: float | None = None
    seconds: float = 0.0


def workloads() -> list[Workload]:
    """In the order in which they are checked: every op in every dtype before any other case of it."""
    groups = (CASES[: len(OPS)], CASES[len(OPS) :])
    return [Workload(op, sizes, d, options) for group in groups for d in DTYPES for op, sizes, options in group]


def places(device: str | None = None) -> tuple[dict[str, torch.device], dict[str, str]]:
    """The device that each backend is checked on, and the reasons of those that cannot run here.

    The GPU if there is one, for all but ``cpu``; kernels that a CPU interprets or emulates are checked there.
    """
    gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    chosen = torch.device(device or ("cuda" if gpu else "cpu"))
    found, absent = {}, {}
    for name, reason in backends.status().items():
        if reason is not None:
            absent[name] = reason
        elif name == "cpu":
            found[name] = torch.device("cpu")
        else:
            found[name] = chosen
    return found, absent


def judged(workload: Workload, where: Mapping[str, torch.device], until: float = float("inf")) -> Iterator[Outcome]:
    """The outcome of ``workload`` on each backend of ``where``, as it comes; none is begun after ``until``.

    Raises DeviceLostError.
    """
    gates: dict[torch.device, gate.Gate] = {}
    for backend, device in where.items():
        op = of(workload).public or workload.op
        said = Outcome(op, workload.name, workload.dtype, backend, str(device), "late")
        if time.monotonic() > until:
            yield said
            continue
        begin = time.monotonic()
        try:
            if device not in gates:
                gates[device] = gate.Gate(workload, case.build(workload, device))
            found = _judge(workload, backend, gates[device])
        except backends.BackendError as error:
            found = {"verdict": "cannot", "why": str(error).split("): ", 1)[-1]}
        except Exception as error:
            found = {"verdict": "wrong", "why": f"{type(error).__name__}: {error}"}
            if machine.is_lost(device):
                yield replace(said, **found)
                raise machine.DeviceLostError(f"the GPU no longer answers after {op} on {backend}") from error
        yield replace(said, **found, seconds=round(time.monotonic() - begin, 3))


def _judge(workload: Workload, backend: str, judge: gate.Gate) -> dict[str, Any]:
    op, options = of(workload), options_of(workload)
    op.choice(judge.case.arguments, options, backend)  # BackendError where it cannot run
    found = judge.check(op.call(options, backend), lenience=max(op.lenience, LENIENCE.get(backend, 1.0)))
    if found.red is not None:
        return {"verdict": "wrong", "why": found.red}
    return {"verdict": "right", "error": found.error, "eager_error": found.eager_error}


@dataclass
class Line:
    """What is printed of one op on one backend."""

    op: str
    backend: str
    outcomes: list[Outcome]

    def of(self, verdict: str) -> list[Outcome]:
        return [o for o in self.outcomes if o.verdict == verdict]

    @property
    def verdict(self) -> str:
        """The worst that was seen; "late" and "cannot" only where nothing was checked."""
        return next(v for v in ("wrong", "right", "late", "cannot") if self.of(v))

    def __str__(self) -> str:
        right, checked = self.of("right"), len(self.outcomes) - len(self.of("late")) - len(self.of("cannot"))
        text = f"{self.op:<14} {self.backend:<10} {self.verdict.upper() if self.of('wrong') else self.verdict:<7}"
        if not checked:
            return f"{text} {'the time was spent' if self.of('late') else self.of('cannot')[0].why}"
        text += f" {len(right)} of {checked}"
        ratios = [o.error / o.eager_error for o in right if o.error is not None and o.eager_error]
        text += f"  error {max(ratios):.2f} x eager's" if ratios else ""
        text += f"  {len(self.of('late'))} not reached" if self.of("late") else ""
        return text + "".join(f"\n    {o.workload}: {o.why}" for o in self.of("wrong")[:3])


def lines(outcomes: Iterable[Outcome]) -> list[Line]:
    found: dict[tuple[str, str], Line] = {}
    for outcome in outcomes:
        key = (outcome.op, outcome.backend)
        found.setdefault(key, Line(*key, [])).outcomes.append(outcome)
    return list(found.values())


def status_of(outcomes: Sequence[Outcome]) -> int:
    """RIGHT if every op was right wherever it can run, LATE if the time did not reach one, WRONG if nothing ran."""
    verdicts = {line.verdict for line in lines(outcomes)}
    if "wrong" in verdicts:
        return WRONG
    if "late" in verdicts:
        return LATE
    return RIGHT if "right" in verdicts else WRONG


VERDICTS = {
    RIGHT: "Right: every op agrees with float64 on every backend that can run here.",
    WRONG: "WRONG: do not use what is marked; please report it with the output of `mfd-fast env`.",
    LATE: "Not finished: the time did not reach every op; --seconds gives it more.",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mfd-fast check",
        description="Compare every op on every backend that can run here with float64, forward and backward. "
        "Exit status: 0 right, 1 wrong, 2 the time did not reach every op.",
    )
    top.add_argument(
        "--device", help="cpu, cuda, cuda:1; default: the GPU if there is one, the CPU for its own kernels"
    )
    top.add_argument("--backend", action="append", choices=backends.NAMES, help="only this one (may be repeated)")
    top.add_argument("--seconds", type=float, default=SECONDS, help=f"no case is begun later; default {SECONDS:g}")
    top.add_argument("--json", type=Path, help="write every outcome here")
    return top


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    asked = parser().parse_args(argv)
    try:
        where, absent = places(None if asked.device is None else str(device_of(asked.device)))
    except ValueError as error:
        print(f"mfd-fast check: {error}", file=sys.stderr)
        return WRONG
    for name in asked.backend or ():
        if name in absent:
            print(f"mfd-fast check: backend {name!r} cannot run here: {absent[name]}", file=sys.stderr)
            return WRONG
    where = {k: v for k, v in where.items() if not asked.backend or k in asked.backend}
    begin = time.monotonic()
    outcomes, lost = run(where, begin + asked.seconds, _progress)
    status = WRONG if lost else status_of(outcomes)
    for line in lines(outcomes):
        print(line)
    for name, reason in absent.items():
        print(f"{'not checked':<14} {name:<10} {reason}")
    print(f"{lost or VERDICTS[status]} ({time.monotonic() - begin:.0f} s, {', '.join(_named(where))})")
    if asked.json is not None:
        asked.json.write_text(json.dumps(document(outcomes, absent, status, lost), indent=1) + "\n", encoding="utf-8")
    return status


def run(
    where: Mapping[str, torch.device], until: float, said: Callable[[str], None] = lambda _: None
) -> tuple[list[Outcome], str]:
    """Every outcome, and why the check had to stop ("" where it had not)."""
    found: list[Outcome] = []
    try:
        for workload in workloads():
            said(workload.name)
            found += judged(workload, where, until)
    except machine.DeviceLostError as error:
        return found, f"WRONG: {error}."
    finally:
        said("")
    return found, ""


def document(outcomes: Sequence[Outcome], absent: Mapping[str, str], status: int, lost: str) -> dict[str, Any]:
    device = torch.device("cuda" if any(o.device.startswith("cuda") for o in outcomes) else "cpu")
    return {
        "schema": 1,
        "verdict": ("right", "wrong", "not finished")[status],
        "stopped": lost,
        "machine": machine.facts(device),
        "outcomes": [asdict(o) for o in outcomes],
        "not_checked": dict(absent),
    }


def _named(where: Mapping[str, torch.device]) -> list[str]:
    """The devices, each once: the name of a GPU, or cpu."""
    devices = dict.fromkeys(where.values())
    return [torch.cuda.get_device_name(d) if d.type == "cuda" else str(d) for d in devices]


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
