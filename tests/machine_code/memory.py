"""Memory, the exchange of values between lanes, and what only orders them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .machine import RANK_BITS, SHARED_WINDOW, STACK_BYTES, Access, Decoded, Machine, Values, executes
from .operands import Operand

OFFSET = (1 << RANK_BITS) - 1


def address(machine: Machine, operand: Operand) -> Values:
    found = np.full(machine.threads, operand.offset, np.int64)
    signed = any(base.wide for base in operand.bases)
    for base in operand.bases:
        file = machine.files[base.kind]
        value = file[base.number].astype(np.int64)
        if base.wide:
            value = value | file[base.number + 1].astype(np.int64) << 32
        elif signed:
            value = file[base.number].view(np.int32).astype(np.int64)
        found += value * base.factor
    return found


def _record(machine: Machine, addresses: Values, size: int, active: Values, shared: bool) -> None:
    """Sectors of global memory; cycles of shared memory, with its bank conflicts."""
    found = {}
    for warp in np.unique(machine.warp[active]).tolist():
        own = addresses[active & (machine.warp == warp)]
        if shared:
            lanes, units = 128 // max(size, 4), 0
            for k in range(0, len(own), lanes):
                first = own[k : k + lanes] >> 2
                words = np.unique(np.concatenate([first + j for j in range(max(1, size // 4))]))
                units += int(np.bincount(words & 31).max())
        else:
            units = len(np.unique(np.concatenate([own >> 5, own + size - 1 >> 5])))
        found[warp] = Access(len(own) * size, units, -1 if shared else int(own[0]))
    machine.trace.accesses[len(machine.trace.steps) - 1] = found


def _read(store: Values, at: Values, size: int) -> list[Values]:
    if size == 1:
        return [store[at].astype(np.uint32)]
    if (at % size).any():
        raise RuntimeError("a misaligned address")
    if size == 2:
        return [store.view(np.uint16)[at >> 1].astype(np.uint32)]
    return [store.view(np.uint32)[(at >> 2) + k] for k in range(size // 4)]


def _store(store: Values, at: Values, size: int, words: list[Values]) -> None:
    if size == 1:
        store[at] = words[0].astype(np.uint8)
    elif (at % size).any():
        raise RuntimeError("a misaligned address")
    elif size == 2:
        store.view(np.uint16)[at >> 1] = words[0].astype(np.uint16)
    else:
        for k, word in enumerate(words):
            store.view(np.uint32)[(at >> 2) + k] = word


def _own_shared(machine: Machine, addresses: Values) -> Values:
    """Positions in the shared memory of the threads' own blocks."""
    return machine.rank.astype(np.int64) * machine.shared.shape[1] + (addresses & OFFSET)


def _places(machine: Machine, addresses: Values, active: Values, size: int, text: str) -> Any:
    """(store, positions, threads) of generic addresses: global memory, and the cluster's shared memory."""
    is_shared = addresses >> 32 == SHARED_WINDOW
    in_global, in_shared = active & ~is_shared, active & is_shared
    if in_global.any():
        _record(machine, addresses, size, in_global, False)
        yield machine.memory.bytes, machine.memory.positions(addresses[in_global], size, text), in_global
    if in_shared.any():
        lower = addresses[in_shared] & 0xFFFFFFFF
        yield machine.shared.reshape(-1), (lower >> RANK_BITS) * machine.shared.shape[1] + (lower & OFFSET), in_shared


def _put(machine: Machine, target: Operand, words: list[Values], active: Values) -> None:
    for k, word in enumerate(words):
        whole = np.zeros(machine.threads, np.uint32)
        whole[active] = word
        machine.write(target, whole, active, k)


@executes("LDG", "LD")
def load(machine: Machine, decoded: Decoded) -> None:
    operands = [o for o in decoded.operands if not o.is_predicate]
    size = decoded.instruction.bytes_per_thread
    active = machine.active(decoded.mask)
    addresses = address(machine, operands[1])
    for store, at, threads in _places(machine, addresses, active, size, decoded.instruction.text):
        words = _read(store, at, size)
        if "S16" in decoded.modifiers:
            words = [words[0].astype(np.int16).astype(np.int32).view(np.uint32)]
        _put(machine, operands[0], words, threads)


def _words(machine: Machine, operand: Operand, size: int, threads: Values) -> list[Values]:
    return [machine.full(machine.integer(operand, k))[threads] for k in range(max(1, size // 4))]


@executes("STG", "ST")
def store(machine: Machine, decoded: Decoded) -> None:
    size = decoded.instruction.bytes_per_thread
    addresses, active = address(machine, decoded.operands[0]), machine.active(decoded.mask)
    for place, at, threads in _places(machine, addresses, active, size, decoded.instruction.text):
        _store(place, at, size, _words(machine, decoded.operands[1], size, threads))


def _own_local(machine: Machine, addresses: Values) -> Values:
    """Positions in the threads' own stacks, which end at address 0."""
    return np.arange(machine.threads) * STACK_BYTES + (addresses & (STACK_BYTES - 1))


@executes("LDL")
def load_local(machine: Machine, decoded: Decoded) -> None:
    size, active = decoded.instruction.bytes_per_thread, machine.active(decoded.mask)
    at = _own_local(machine, address(machine, decoded.operands[1]))
    _put(machine, decoded.operands[0], _read(machine.local, at[active], size), active)


@executes("STL")
def store_local(machine: Machine, decoded: Decoded) -> None:
    size, active = decoded.instruction.bytes_per_thread, machine.active(decoded.mask)
    at = _own_local(machine, address(machine, decoded.operands[0]))
    _store(machine.local, at[active], size, _words(machine, decoded.operands[1], size, active))


@executes("LDS")
def load_shared(machine: Machine, decoded: Decoded) -> None:
    size, active = decoded.instruction.bytes_per_thread, machine.active(decoded.mask)
    at = _own_shared(machine, address(machine, decoded.operands[1]))
    _record(machine, at, size, active, True)
    _put(machine, decoded.operands[0], _read(machine.shared.reshape(-1), at[active], size), active)


@executes("STS")
def store_shared(machine: Machine, decoded: Decoded) -> None:
    size, active = decoded.instruction.bytes_per_thread, machine.active(decoded.mask)
    at = _own_shared(machine, address(machine, decoded.operands[0]))
    _record(machine, at, size, active, True)
    _store(machine.shared.reshape(-1), at[active], size, _words(machine, decoded.operands[1], size, active))


@executes("LDGSTS")
def copy_to_shared(machine: Machine, decoded: Decoded) -> None:
    size, active = decoded.instruction.bytes_per_thread, machine.active(decoded.mask)
    to = _own_shared(machine, address(machine, decoded.operands[0]))[active]
    source = address(machine, decoded.operands[1])
    _record(machine, source, size, active, False)
    at = machine.memory.positions(source[active], size, decoded.instruction.text)
    _store(machine.shared.reshape(-1), to, size, _read(machine.memory.bytes, at, size))


@executes("LDSM")
def load_matrix(machine: Machine, decoded: Decoded) -> None:
    """An 8x8 matrix of 16 bits: lane l gets word l % 4 of the row whose address lane l / 4 gives."""
    if decoded.modifiers & {"2", "4", "MT88"}:
        raise NotImplementedError(decoded.instruction.text)
    active = machine.active(decoded.mask)
    rows = _own_shared(machine, address(machine, decoded.operands[1]))
    at = rows[(np.arange(machine.threads) & ~31) + machine.lane // 4] + 4 * (machine.lane & 3)
    _record(machine, at, 4, active, True)
    _put(machine, decoded.operands[0], _read(machine.shared.reshape(-1), at[active], 4), active)


@executes("ATOMG", "ATOM", "RED")
def atomic(machine: Machine, decoded: Decoded) -> None:
    registers = [o for o in decoded.operands if o.kind == "R"]
    where = next(o for o in decoded.operands if o.kind == "memory")
    target, source = (None, registers[0]) if decoded.instruction.name == "RED" else registers[:2]
    change = {"ADD": lambda old, new: old + new, "OR": lambda old, new: old | new, "EXCH": lambda _, new: new}
    apply = next(change[name] for name in change if name in decoded.modifiers)
    values, old = machine.full(machine.integer(source)), np.zeros(machine.threads, np.uint32)
    active = machine.active(decoded.mask)
    for place, at, threads in _places(machine, address(machine, where), active, 4, decoded.instruction.text):
        words = place.view(np.uint32)
        for thread, position in zip(np.flatnonzero(threads), at, strict=True):
            old[thread] = words[position >> 2]
            words[position >> 2] = np.uint32(apply(int(old[thread]), int(values[thread])) & 0xFFFFFFFF)
    if target is not None:
        machine.write(target, old, decoded.mask)


@executes("SHFL")
def shuffle(machine: Machine, decoded: Decoded) -> None:
    found, target, source, by, limits = decoded.operands[:5]
    values = machine.full(machine.integer(source))
    amount, bounds = (machine.full(machine.integer(o)).astype(np.int64) for o in (by, limits))
    lane, clamp, segment = machine.lane, bounds & 31, bounds >> 8 & 31
    last = lane & segment | clamp & ~segment
    mode = decoded.instruction.modifiers[0]
    partner = {
        "BFLY": lambda: lane ^ (amount & 31),
        "IDX": lambda: lane & segment | amount & 31 & ~segment,
        "UP": lambda: lane - (amount & 31),
        "DOWN": lambda: lane + (amount & 31),
    }[mode]()
    exists = partner >= last if mode == "UP" else partner <= last
    first = np.arange(machine.threads) & ~31
    origin = np.where(exists, first + np.clip(partner, 0, 31), first + lane)
    machine.write(target, values[origin], decoded.mask)
    machine.write(found, exists, decoded.mask)


@executes("REDUX")
def reduce_warp(machine: Machine, decoded: Decoded) -> None:
    values = np.ascontiguousarray(machine.full(machine.integer(decoded.operands[1]))).reshape(-1, 32)
    active = machine.active(decoded.mask).reshape(-1, 32)
    if decoded.modifiers & {"MAX", "MIN"}:
        signed = values.view(np.uint32 if "U32" in decoded.modifiers else np.int32)
        worst = np.iinfo(signed.dtype).min if "MAX" in decoded.modifiers else np.iinfo(signed.dtype).max
        chosen = np.where(active, signed, worst)
        result = (chosen.max(1) if "MAX" in decoded.modifiers else chosen.min(1)).astype(signed.dtype).view(np.uint32)
    elif decoded.modifiers & {"OR", "AND", "XOR"}:
        raise NotImplementedError(decoded.instruction.text)
    else:
        result = np.where(active, values, 0).sum(1, dtype=np.uint64).astype(np.uint32)
    machine.write(decoded.operands[0], np.repeat(result, 32), decoded.mask)


@executes("VOTE", "VOTEU")
def vote(machine: Machine, decoded: Decoded) -> None:
    """The ballot of a predicate, and whether any lane or all lanes have it."""
    targets = [o for o in decoded.operands[:-1] if not o.inverted]
    active = machine.active(decoded.mask).reshape(-1, 32)
    votes = machine.predicate(decoded.operands[-1]).reshape(-1, 32) & active
    ballot = (votes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
    agreed = (votes | ~active).all(1) if "ALL" in decoded.modifiers else votes.any(1)
    for target in targets[:2]:
        machine.write(target, np.repeat(agreed if target.is_predicate else ballot, 32), decoded.mask)


@executes("NOP", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "LDGDEPBAR", "DEPBAR", "YIELD", "ENDCOLLECTIVE", "FENCE")
def nothing(machine: Machine, decoded: Decoded) -> None:
    """Every access here is complete at once."""
