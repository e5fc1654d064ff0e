"""Classes of instructions, what was executed of each, and the bounds that follow for an H200."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

from .machine import Trace
from .sass import Instruction, Kernel

CLASSES = {
    "fma": "FADD FMUL FFMA FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2",
    "imad": "IMAD IMUL",
    "alu": "FSEL FMNMX FSETP FSET FCHK ISETP IADD3 LOP3 SHF PRMT SEL LEA IMNMX VIMNMX PLOP3 MOV IABS BMSK SGXT P2R R2P "
    "CS2R F2FP I2FP VIADD VIADDMNMX VHMNMX HMNMX2 HSETP2 VOTE",
    "mufu": "MUFU",
    "conversion": "F2F F2I I2F FRND POPC FLO BREV",
    "fp64": "DADD DMUL DFMA DSETP",
    "tensor": "HMMA HGMMA IMMA",
    "shared": "LDS STS LDSM STSM ATOMS",
    "global": "LDG STG LD ST LDGSTS ATOM ATOMG RED LDL STL CCTL",
    "shuffle": "SHFL REDUX",
    "barrier": "BAR UCGABAR_ARV UCGABAR_WAIT MEMBAR ERRBAR CGAERRBAR DEPBAR LDGDEPBAR FENCE",
    "constant": "LDC ULDC",
    "control": "BRA BRX BSSY BSYNC WARPSYNC EXIT CALL RET NOP BREAK YIELD BMOV ENDCOLLECTIVE JMP",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}

#: H200: multiprocessors, clock, bytes per second of a copy, and what one of them moves per clock.
PROCESSORS, HERTZ, COPY_BANDWIDTH = 132, 1.98e9, 4.3e12
BYTES_PER_CLOCK = COPY_BANDWIDTH / HERTZ / PROCESSORS
#: Lanes per clock and multiprocessor.
ISSUE, FMA, ALU, MUFU, FP64, SHUFFLE = 128, 128, 64, 16, 64, 32


def class_of(instruction: Instruction) -> str:
    name = instruction.name
    if name in CLASS_OF:
        return CLASS_OF[name]
    return "uniform" if name[0] == "U" or name in ("R2UR", "S2UR") else "other"


def is_store(instruction: Instruction) -> bool:
    return instruction.name in ("STG", "ST", "RED")


def counts(kernel: Kernel, trace: Trace) -> Counter[str]:
    """Warp-instructions by class, "total" of them, bytes of global memory and cycles of shared memory."""
    found: Counter[str] = Counter()
    for step, (index, warps) in enumerate(trace.steps):
        instruction = kernel.instructions[index]
        kind, issued = class_of(instruction), warps.bit_count()
        found[kind] += issued
        found["total"] += issued
        for access in trace.accesses.get(step, {}).values():
            if kind == "global":
                found["bytes stored" if is_store(instruction) else "bytes loaded"] += access.bytes
                if access.bytes < 16 * 32 and instruction.bytes_per_thread < 16:
                    found["narrow accesses"] += 1
            elif kind == "shared":
                found["shared cycles"] += access.units
    return found


def is_double(instruction: Instruction) -> bool:
    """Arithmetic on float64, or a conversion from or to 64 bits."""
    kind = class_of(instruction)
    wide = any("64" in part for part in instruction.modifiers)
    return kind == "fp64" or (kind == "conversion" and wide and instruction.name != "FLO")


def is_narrow(instruction: Instruction) -> bool:
    """An access to global memory of fewer than 16 bytes a thread."""
    return class_of(instruction) == "global" and instruction.name != "CCTL" and instruction.bytes_per_thread < 16


def executions(trace: Trace) -> tuple[Counter[int], Counter[int]]:
    """How many warps have executed each instruction, by its index, and how many have reached global memory by it."""
    executed: Counter[int] = Counter()
    reached: Counter[int] = Counter()
    for step, (index, mask) in enumerate(trace.steps):
        executed[index] += mask.bit_count()
        reached[index] += len(trace.accesses.get(step, {}))
    return executed, reached


def _reduces(instruction: Instruction) -> bool:
    """Whether it takes a value of another thread: by a shuffle, or a double from another block of a cluster."""
    return instruction.name == "SHFL" or (instruction.name == "LD" and instruction.bytes_per_thread == 8)


def reducing(kernel: Kernel) -> set[int]:
    """The instructions whose innermost loop is one over threads or blocks."""
    loops = [(i.target, i.index) for i in kernel.instructions if i.name == "BRA" and 0 <= i.target < i.index]
    found: set[int] = set()
    for first, last in sorted(loops, key=lambda loop: loop[0] - loop[1]):  # the inner ones have the last word
        inside = range(first, last + 1)
        reduces = any(_reduces(kernel.instructions[k]) for k in inside)
        found = found | set(inside) if reduces else found - set(inside)
    return found


def in_column_loops(
    kernel: Kernel, trace: Trace, warps: int, elements: float, before: Trace | None = None
) -> dict[str, int]:
    """What is in the loops over a row's columns that should not be: instructions of :func:`is_double` and of
    :func:`is_narrow`.

    Such a loop is what a warp executes for three of four times 32*8 of the ``elements`` that ``trace`` has beside those
    of ``before``, and each of ``warps``, counted anew for every row, twice or more; a reduction is none.
    """
    reductions = reducing(kernel)
    executed, reached = executions(trace)
    if before is not None:
        for all_of, less in zip((executed, reached), executions(before), strict=True):
            all_of.subtract(less)

    def often(of: Counter[int]) -> list[Instruction]:
        least = max(2 * warps, 0.75 * elements / (32 * 8))
        return [kernel.instructions[k] for k, times in of.items() if times >= least and k not in reductions]

    return {
        "doubles_in_loops": sum(map(is_double, often(executed))),
        "narrow_in_loops": sum(map(is_narrow, often(reached))),
    }


def digest(kernel: Kernel) -> str:
    """Of the machine code: the same for kernels that execute the same instructions in the same order."""
    found = hashlib.sha256()
    for instruction in kernel.instructions:
        text = re.sub(r"`\([^)]*\)", str(instruction.target - instruction.index), instruction.text)
        control = (instruction.stall, instruction.writes, instruction.reads, instruction.waits)
        found.update(f"{instruction.guard} {text} {control}\n".encode())
    return found.hexdigest()[:16]


def per_element(counted: Counter[str], elements: float) -> dict[str, float]:
    """Lane-instructions per element."""
    kinds = ("total", *CLASSES, "uniform", "other")
    return {kind: round(counted[kind] * 32 / elements, 3) for kind in kinds if counted[kind]}


def clocks(counted: Counter[str], elements: float, dram_bytes: float) -> dict[str, float]:
    """Per element and multiprocessor, of each resource by itself; ``dram_bytes`` per element."""
    lanes = {kind: counted[kind] * 32 / elements for kind in counted}
    one = {kind: lanes.get(kind, 0.0) for kind in ("total", *CLASSES)}
    return {
        "bytes": dram_bytes / BYTES_PER_CLOCK,
        "issue": one["total"] / ISSUE,
        "fma": (one["fma"] + one["imad"]) / FMA,
        "imad": one["imad"] / ALU,
        "alu": one["alu"] / ALU,
        "mufu": (one["mufu"] + one["conversion"]) / MUFU,
        "fp64": one["fp64"] / FP64,
        "memory": one["shuffle"] / SHUFFLE
        + counted["shared cycles"] / elements
        + (counted["bytes loaded"] + counted["bytes stored"]) / elements / 128,
    }


def bound(counted: Counter[str], elements: float, dram_bytes: float) -> tuple[float, str]:
    """The largest fraction of the copy bandwidth that any schedule could reach, and what binds."""
    found = clocks(counted, elements, dram_bytes)
    binding = max(found, key=lambda kind: found[kind])
    return found["bytes"] / found[binding], binding
