"""Executes a kernel's machine code, one cluster of blocks at a time, and keeps what every warp issued.

All threads of the cluster run together: of those that may run, those with the least address go first, which brings
diverged threads together again. Nothing here has a duration; ``timing`` gives the recorded instructions one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .operands import Operand, parse
from .sass import Instruction, Kernel

Values = np.ndarray[Any, Any]
#: Where parameters begin in constant bank 0 of sm_90.
PARAMETERS_AT = 0x210
#: Upper half of a generic address that points into shared memory.
SHARED_WINDOW = 0x20000
#: Generic addresses of the shared memory of a cluster: bits 24 and up are the block's rank.
RANK_BITS = 24
#: Shared memory of one block; sm_90 has 227 KiB.
SHARED_BYTES = 233 * 1024
#: Of each thread's local memory.
STACK_BYTES = 1 << 12

Handler = Callable[["Machine", "Decoded"], None]
HANDLERS: dict[str, Handler] = {}


def executes(*names: str) -> Callable[[Handler], Handler]:
    """Registers the function that executes these opcodes, and their uniform twins."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
            HANDLERS.setdefault("U" + name, handler)
        return handler

    return register


@dataclass
class Decoded:
    """An instruction ready to run; ``mask`` are the threads that execute it, None for all."""

    instruction: Instruction
    operands: list[Operand]
    guard: Operand | None
    handler: Handler | None
    modifiers: frozenset[str]
    mask: Values | None = None


@dataclass
class Access:
    """What a warp asked of memory: bytes, and 32-byte sectors of global or cycles of shared memory."""

    bytes: int
    units: int
    address: int


@dataclass
class Trace:
    """(instruction, warps as a bit mask) in the order of execution, and the accesses by step and warp."""

    steps: list[tuple[int, int]] = field(default_factory=list)
    accesses: dict[int, dict[int, Access]] = field(default_factory=dict)

    def of_warps(self, warps: int) -> list[list[tuple[int, Access | None]]]:
        """What each of the first ``warps`` warps issued."""
        found: list[list[tuple[int, Access | None]]] = [[] for _ in range(warps)]
        for step, (index, mask) in enumerate(self.steps):
            accesses = self.accesses.get(step, {})
            for warp in range(warps):
                if mask >> warp & 1:
                    found[warp].append((index, accesses.get(warp)))
        return found


class HostMemory:
    """The memory of this process: tensors keep their addresses."""

    def __init__(self) -> None:
        class Everything:
            __array_interface__: ClassVar = {
                "data": (0x1000, False),
                "shape": ((1 << 47) - 0x2000,),
                "typestr": "|u1",
                "version": 3,
            }

        self.bytes = np.asarray(Everything())
        self._harmless = np.zeros(4096, np.uint8)
        #: Where threads that do not take part read.
        self.harmless = (self._harmless.ctypes.data + 64) // 64 * 64 - 0x1000
        self._writable: list[tuple[int, int]] = []

    def positions(self, addresses: Values, size: int, what: str) -> Values:
        """Indices into ``bytes`` of checked addresses."""
        first, last = int(addresses.min()), int(addresses.max()) + size
        if not any(a <= first and last <= b for a, b in self._writable):
            self._read_maps()
            for address in addresses.tolist():
                if not any(a <= address and address + size <= b for a, b in self._writable):
                    raise RuntimeError(f"bad address {address:#x}: {what}")
        return addresses - 0x1000

    def _read_maps(self) -> None:
        self._writable = []
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, rights = line.split()[:2]
                if rights.startswith("rw"):
                    begin, end = (int(x, 16) for x in span.split("-"))
                    if self._writable and self._writable[-1][1] == begin:
                        begin = self._writable.pop()[0]
                    self._writable.append((begin, end))


# What holds a thread back.
RUNNING, AT_BARRIER, AT_RECONVERGENCE, AT_WARP_SYNC, AT_CLUSTER_BARRIER = range(5)


class Machine:
    """The threads of one cluster (or of one block) of a launch."""

    def __init__(self, kernel: Kernel, parameters: bytes, threads: int, grid: int, cluster: int, first_block: int):
        self.kernel, self.blocks = kernel, cluster
        self.threads = total = threads * cluster
        self.warps = total // 32
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), cluster)
        self.rank = np.repeat(np.arange(cluster, dtype=np.uint32), threads)
        self.block = self.rank + np.uint32(first_block)
        self.warp = np.arange(total) // 32
        self.lane = np.arange(total) & 31
        self.files: dict[str, Values] = {
            "R": np.zeros((256, total), np.uint32),
            "UR": np.zeros((64, total), np.uint32),
            "P": np.zeros((8, total), bool),
            "UP": np.zeros((8, total), bool),
            "B": np.zeros((16, total), bool),  # which threads a reconvergence point expects
        }
        self.files["P"][7] = self.files["UP"][7] = True
        self.at = np.zeros(total, np.int64)
        self.alive = np.ones(total, bool)
        self.held = np.zeros(total, np.int8)
        self.held_by = np.zeros(total, np.int64)  # the number of the reconvergence point
        self.calls: list[list[int]] = [[] for _ in range(total)]
        self.shared = np.zeros((cluster, SHARED_BYTES), np.uint8)
        self.local = np.zeros(total * STACK_BYTES, np.uint8)
        self.memory = HostMemory()
        self.trace = Trace()
        self._parameters = np.frombuffer(bytearray(parameters) + bytearray(64), np.uint8)
        self.banks = {number: np.frombuffer(data + bytes(64), np.uint8) for number, data in kernel.banks.items()}
        self.banks[0] = self._bank_of_launch(parameters, threads, grid)
        self.code = [self._decode(instruction) for instruction in kernel.instructions]

    def _bank_of_launch(self, parameters: bytes, threads: int, grid: int) -> Values:
        bank = np.zeros(PARAMETERS_AT + -(-len(parameters) // 8) * 8 + 4096, np.uint8)
        words = bank.view(np.uint32)
        words[0:6] = threads, 1, 1, grid, 1, 1
        words[0x140 // 4] = self.blocks > 1
        words[0x188 // 4] = self.blocks
        bank.view(np.uint64)[0x198 // 8] = self._parameters.ctypes.data
        bank[PARAMETERS_AT : PARAMETERS_AT + len(parameters)] = np.frombuffer(parameters, np.uint8)
        return bank

    def _decode(self, instruction: Instruction) -> Decoded:
        generic = instruction.name in ("LD", "ST", "ATOM")
        operands = [parse(text, generic) for text in instruction.arguments]
        # The text of a NaN does not say its bits.
        operands = [
            Operand("integer", value=instruction.immediate) if o.kind == "float" and o.value != o.value else o
            for o in operands
        ]
        guard = parse(instruction.guard) if instruction.guard else None
        handler = HANDLERS.get(instruction.name)
        return Decoded(instruction, operands, guard, handler, frozenset(instruction.modifiers))

    # ---- operands

    def predicate(self, operand: Operand) -> Values:
        values = self.files[operand.kind][operand.number]
        return ~values if operand.inverted else values

    def _register(self, operand: Operand, part: int) -> Values:
        file = self.files[operand.kind]
        return file[operand.number if operand.is_nothing else operand.number + part]

    def constant(self, operand: Operand, size: int = 4, part: int = 0) -> Values:
        """Bytes of a constant bank as uint32; a scalar where no register is in the address."""
        bank = self.banks[operand.number]
        at = np.asarray(operand.offset + 4 * part)
        for base in operand.bases:
            at = at + self.files[base.kind][base.number].astype(np.int64)
        at = np.minimum(at & 0xFFFFFFFF, bank.size - 8)
        words = [bank[at + k].astype(np.uint32) << np.uint32(8 * k) for k in range(min(size, 4))]
        return np.bitwise_or.reduce(words)

    def integer(self, operand: Operand, part: int = 0) -> Values:
        """uint32, of one thread each or a scalar; ``part`` of a pair of registers."""
        if operand.kind == "integer":
            value = int(operand.value)
            value = (-1 if value < 0 else 0) if part else value
            return np.uint32((~value if operand.inverted else value) & 0xFFFFFFFF)
        if operand.kind == "float":
            return np.float32(operand.value).view(np.uint32)
        raw = self.constant(operand, 4, part) if operand.kind == "constant" else self._register(operand, part)
        if operand.absolute:
            raw = np.abs(raw.view(np.int32)).view(np.uint32)
        if operand.inverted:
            raw = ~raw
        return ~raw + np.uint32(1) if operand.negative else raw

    def single(self, operand: Operand) -> Values:
        """float32."""
        if operand.kind == "float":
            return np.float32(operand.value)
        if operand.kind == "integer":
            return np.uint32(int(operand.value) & 0xFFFFFFFF).view(np.float32)
        raw = self.constant(operand) if operand.kind == "constant" else self._register(operand, 0)
        if operand.half.startswith("H"):
            raw = raw >> np.uint32(16) if operand.half == "H1_H1" else raw & np.uint32(0xFFFF)
            value = raw.astype(np.uint16).view(np.float16).astype(np.float32)
        else:
            value = np.ascontiguousarray(raw).view(np.float32)
        return self._signed(value.reshape(raw.shape), operand)

    def double(self, operand: Operand) -> Values:
        """float64, of a pair of registers."""
        if operand.kind == "float":
            return np.float64(operand.value)
        if operand.kind == "integer":
            return np.uint64((int(operand.value) & 0xFFFFFFFF) << 32).view(np.float64)
        parts = [
            self.constant(operand, 4, k) if operand.kind == "constant" else self._register(operand, k) for k in (0, 1)
        ]
        bits = parts[0].astype(np.uint64) | parts[1].astype(np.uint64) << np.uint64(32)
        return self._signed(np.ascontiguousarray(bits).view(np.float64).reshape(parts[0].shape), operand)

    @staticmethod
    def _signed(value: Values, operand: Operand) -> Values:
        value = np.abs(value) if operand.absolute else value
        return -value if operand.negative else value

    def full(self, values: Any) -> Values:
        """One value per thread."""
        return np.broadcast_to(np.asarray(values), (self.threads,))

    def write(self, operand: Operand, values: Any, mask: Values | None, part: int = 0) -> None:
        if operand.is_nothing:
            return
        values = np.asarray(values)
        if values.dtype in (np.int32, np.float32):
            values = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
        target = self.files[operand.kind][operand.number + part]
        if mask is None:
            target[...] = values
        else:
            np.copyto(target, values, where=mask, casting="unsafe")

    def write_pair(self, operand: Operand, values: Any, mask: Values | None) -> None:
        """A float64 or 64-bit integer."""
        bits = np.ascontiguousarray(self.full(values)).view(np.uint64)
        self.write(operand, (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask, 0)
        self.write(operand, (bits >> np.uint64(32)).astype(np.uint32), mask, 1)

    def active(self, mask: Values | None) -> Values:
        return np.ones(self.threads, bool) if mask is None else mask

    # ---- running

    def run(self, limit: int = 5_000_000) -> Trace:
        """Until every thread has left. Raises RuntimeError for a deadlock or an instruction that is not known."""
        with np.errstate(all="ignore"):  # threads that do not take part compute too
            while self.alive.any():
                self._run_next()
                if len(self.trace.steps) > limit:
                    raise RuntimeError("too many steps")
        return self.trace

    def _run_next(self) -> None:
        ready = self.alive & (self.held == RUNNING)
        if not ready.any():
            where = {(int(self.held[t]), int(self.at[t])) for t in np.flatnonzero(self.alive)}
            raise RuntimeError(f"deadlock: {sorted(where)[:10]}")
        first = int(self.at[ready].min())
        group = ready & (self.at == first)
        others = self.at[ready & ~group]
        self._run_group(group, first, int(others.min()) if others.size else len(self.code))

    def _run_group(self, group: Values, at: int, stop: int) -> None:
        """Straight on to a branch, or to where other threads wait."""
        whole = bool(group.all())
        warps = 0
        for warp in np.unique(self.warp[group]).tolist():
            warps |= 1 << warp
        while True:
            decoded = self.code[at]
            self.trace.steps.append((at, warps))
            mask = None if whole else group
            if decoded.guard is not None:
                allowed = self.predicate(decoded.guard)
                mask = allowed if mask is None else allowed & mask
            if decoded.instruction.name in CONTROL:
                self.at[group] = at + 1
                CONTROL[decoded.instruction.name](self, decoded, self.active(mask) & group)
                return
            if decoded.handler is None:
                raise RuntimeError(f"not known: {decoded.instruction.address:#x} {decoded.instruction.text}")
            if decoded.guard is None or mask is None or mask.any():
                decoded.mask = mask
                try:
                    decoded.handler(self, decoded)
                except Exception as error:
                    text = decoded.instruction.text
                    raise RuntimeError(f"{decoded.instruction.address:#x} {text}: {error!r}") from error
            at += 1
            if at >= stop:
                self.at[group] = at
                return

    # ---- threads that wait for each other

    def hold(self, threads: Values, why: int, index: int, number: int = 0) -> None:
        self.at[threads] = index
        self.held[threads] = why
        self.held_by[threads] = number
        self.release()

    def _free(self, threads: Values) -> None:
        self.held[threads] = RUNNING
        self.at[threads] += 1

    def release(self) -> None:
        """Lets go on whoever has met all it waits for."""
        waiting = self.alive & (self.held == AT_RECONVERGENCE)
        for warp in np.unique(self.warp[waiting]):
            own = self.alive & (self.warp == warp)
            for number in np.unique(self.held_by[waiting & own]):
                here = waiting & own & (self.held_by == number)
                if not (self.files["B"][number] & own & ~here).any():
                    self._free(here)
        for why, groups in ((AT_WARP_SYNC, self.warp), (AT_BARRIER, self.rank)):
            waiting = self.alive & (self.held == why)
            for group in np.unique(groups[waiting]):
                own = self.alive & (groups == group)
                if not (own & ~waiting).any():
                    self._free(own)
        waiting = self.alive & (self.held == AT_CLUSTER_BARRIER)
        if waiting.any() and not (self.alive & ~waiting).any():
            self._free(waiting)


# ---- control flow: `taken` are the threads for which the guard holds

Control = Callable[[Machine, Decoded, Values], None]


def _branch(machine: Machine, decoded: Decoded, taken: Values) -> None:
    if "DIV" in decoded.modifiers:  # asks whether lanes are missing; the other way is always right here
        return
    for operand in decoded.operands:
        if operand.is_predicate:
            taken = taken & machine.predicate(operand)
    machine.at[taken] = decoded.instruction.target


def _indexed_branch(machine: Machine, decoded: Decoded, taken: Values) -> None:
    register, offset = decoded.instruction.text.split()[1:3]
    addresses = machine.integer(parse(register)).view(np.int32).astype(np.int64)
    addresses = addresses + int(offset, 16) + decoded.instruction.address + 16
    machine.at[taken] = addresses[taken] // 16


def _leave(machine: Machine, decoded: Decoded, taken: Values) -> None:
    machine.alive[taken] = False
    machine.release()


def _expect(machine: Machine, decoded: Decoded, taken: Values) -> None:
    file = machine.files["B"][decoded.operands[0].number]
    touched = np.isin(machine.warp, np.unique(machine.warp[taken]))
    file[touched] = taken[touched]


def _break(machine: Machine, decoded: Decoded, taken: Values) -> None:
    point = next(operand for operand in decoded.operands if operand.kind == "B")
    machine.files["B"][point.number][taken] = False


def _reconverge(machine: Machine, decoded: Decoded, taken: Values) -> None:
    machine.hold(taken, AT_RECONVERGENCE, decoded.instruction.index, decoded.operands[0].number)


def _warp_sync(machine: Machine, decoded: Decoded, taken: Values) -> None:
    if "COLLECTIVE" not in decoded.modifiers:
        machine.hold(taken, AT_WARP_SYNC, decoded.instruction.index)


def _barrier(machine: Machine, decoded: Decoded, taken: Values) -> None:
    machine.hold(taken, AT_BARRIER, decoded.instruction.index)


def _cluster_barrier(machine: Machine, decoded: Decoded, taken: Values) -> None:
    machine.hold(taken, AT_CLUSTER_BARRIER, decoded.instruction.index)


def _call(machine: Machine, decoded: Decoded, taken: Values) -> None:
    for thread in np.flatnonzero(taken):
        machine.calls[thread].append(decoded.instruction.index + 1)
    machine.at[taken] = decoded.instruction.target


def _return(machine: Machine, decoded: Decoded, taken: Values) -> None:
    for thread in np.flatnonzero(taken):
        machine.at[thread] = machine.calls[thread].pop()


def _nothing(machine: Machine, decoded: Decoded, taken: Values) -> None:
    pass


CONTROL: dict[str, Control] = {
    **dict.fromkeys(("BRA", "JMP"), _branch),
    "BRX": _indexed_branch,
    "EXIT": _leave,
    "BSSY": _expect,
    "BREAK": _break,
    "BSYNC": _reconverge,
    "WARPSYNC": _warp_sync,
    "BAR": _barrier,
    "UCGABAR_ARV": _nothing,
    "UCGABAR_WAIT": _cluster_barrier,
    "CALL": _call,
    "RET": _return,
}
