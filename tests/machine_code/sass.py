"""Kernels of a cubin as lists of instructions, with their control words."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: `/*0120*/  @!P0 FADD R1, R2, -R3 ;  /* 0x... */`, and the second half of the 128 bits on the next line.
FIRST = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x([0-9a-f]{16}) \*/")
SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
SECTION = re.compile(r"^\s*\.section\s+(\S+?),|^//-+ (\S+)")
LABEL = re.compile(r"^(\S+):\s*$")
GUARD = re.compile(r"^@(!?U?P\w+)\s+(.*)$")


@dataclass
class Instruction:
    """One instruction; ``arguments`` as nvdisasm writes them."""

    index: int
    address: int
    guard: str  # "P0", "!UP1" or "" for always
    opcode: str  # with its modifiers
    arguments: list[str]
    text: str
    immediate: int  # bits 32 to 63 of the instruction
    stall: int = 0  # clocks before this warp may issue again
    writes: int = 7  # scoreboard released when the result is there; 7 for none
    reads: int = 7  # scoreboard released when the sources are read
    waits: int = 0  # scoreboards to wait for, a bit each
    target: int = -1  # of a branch, as an index
    targets: list[int] = field(default_factory=list)  # of an indexed branch

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def bytes_per_thread(self) -> int:
        """Of a memory instruction."""
        for part in self.modifiers:
            if part in ("U8", "S8"):
                return 1
            if part in ("U16", "S16"):
                return 2
            if part in ("64", "128"):
                return int(part) // 8
        return 16 if self.name == "LDSM" else 4


@dataclass
class Kernel:
    """One function of a cubin."""

    name: str
    registers: int
    static_shared: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    banks: dict[int, bytes] = field(default_factory=dict)  # constants but for the parameters

    @property
    def allocated_registers(self) -> int:
        """Per thread, in the units of the register file."""
        return (self.registers + 7) // 8 * 8

    def resident_blocks(self, threads: int, dynamic_shared: int) -> int:
        """Blocks that one sm_90 multiprocessor holds at a time."""
        shared = dynamic_shared + self.static_shared + 1024
        return min(65536 // (self.allocated_registers * threads), 233472 // shared, 2048 // threads, 32)


def tools() -> Path | None:
    """Where nvdisasm and cuobjdump are: in the Triton package, or in the toolkit."""
    triton = importlib.util.find_spec("triton")
    candidates = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    found = shutil.which("nvdisasm")
    candidates += [Path(found).parent] if found else []
    return next((path for path in candidates if (path / "nvdisasm").exists()), None)


def _run(tool: str, *arguments: object) -> str:
    directory = tools()
    if directory is None:
        raise FileNotFoundError("neither Triton nor a CUDA toolkit has nvdisasm")
    command = [str(directory / tool), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sections(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Size and contents of each section of an ELF file; no contents where it only reserves room."""
    (at,) = struct.unpack_from("<Q", data, 40)
    entry, count, names = struct.unpack_from("<HHH", data, 58)
    heads = [struct.unpack_from("<IIQQQQIIQQ", data, at + k * entry) for k in range(count)]
    strings = data[heads[names][4] : heads[names][4] + heads[names][5]]
    found = {}
    for head in heads:
        name = strings[head[0] : strings.index(b"\0", head[0])].decode()
        found[name] = head[5], b"" if head[1] == 8 else data[head[4] : head[4] + head[5]]
    return found


def split_arguments(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for k, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(text[start:k].strip())
            start = k + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def _first_half(kernel: Kernel, match: re.Match[str]) -> Instruction:
    body = match[2]
    guarded = GUARD.match(body)
    guard, body = (guarded[1], guarded[2]) if guarded else ("", body)
    opcode, _, rest = body.partition(" ")
    index = len(kernel.instructions)
    return Instruction(index, int(match[1], 16), guard, opcode, split_arguments(rest), body, int(match[3], 16) >> 32)


def _control_word(instruction: Instruction, bits: int) -> None:
    instruction.stall = bits >> 41 & 15
    instruction.writes = bits >> 46 & 7
    instruction.reads = bits >> 49 & 7
    instruction.waits = bits >> 52 & 63


def _resolve_labels(kernel: Kernel) -> None:
    for instruction in kernel.instructions:
        for label in re.findall(r"`\(([^)]+)\)", instruction.text):
            instruction.target = kernel.labels.get(label, instruction.target)
        if instruction.name == "BRX":
            found = re.findall(r"\.L_x_\d+", instruction.text)
            instruction.targets = [kernel.labels[label] for label in found if label in kernel.labels]


def _lines_by_kernel(listing: str) -> Iterator[tuple[str, str]]:
    name = ""
    for line in listing.splitlines():
        section = SECTION.match(line)
        if section:
            title = section[1] or section[2]
            name = title[len(".text.") :] if title.startswith(".text.") else ""
        elif name:
            yield name, line


def read(cubin: Path, pattern: str = "") -> dict[str, Kernel]:
    """The kernels of a cubin whose mangled name ``pattern`` is found in."""
    usage = _run("cuobjdump", "-res-usage", cubin)
    registers = {name: int(count) for name, count in re.findall(r"Function (\w+):\s+REG:(\d+)", usage)}
    elf = sections(cubin.read_bytes())
    kernels: dict[str, Kernel] = {}
    for name, line in _lines_by_kernel(_run("nvdisasm", "-c", "-hex", cubin)):
        if not re.search(pattern, name):
            continue
        if name not in kernels:
            kernels[name] = Kernel(name, registers.get(name, 0), elf.get(f".nv.shared.{name}", (0, b""))[0])
        kernel = kernels[name]
        if label := LABEL.match(line):
            kernel.labels[label[1]] = len(kernel.instructions)
        elif first := FIRST.match(line):
            kernel.instructions.append(_first_half(kernel, first))
        elif (second := SECOND.match(line)) and kernel.instructions:
            _control_word(kernel.instructions[-1], int(second[1], 16))
    for name, kernel in kernels.items():
        _resolve_labels(kernel)
        for bank in range(1, 8):
            for section in (f".nv.constant{bank}.{name}", f".nv.constant{bank}"):
                if section in elf:
                    kernel.banks.setdefault(bank, elf[section][1])
    return kernels


def stack_bytes(cubin: Path) -> dict[str, int]:
    """Of each kernel: spills show here."""
    usage = _run("cuobjdump", "-res-usage", cubin)
    return {name: int(count) for name, count in re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", usage)}
