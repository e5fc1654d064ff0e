"""Integer, logical and moving instructions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .floating import compare, comparison_of, set_predicates
from .machine import SHARED_WINDOW, Decoded, Machine, Values, executes
from .operands import Operand

LOW = np.uint64(0xFFFFFFFF)
BITS = np.uint64(32)


def _wide(values: Any) -> Values:
    return np.asarray(values).astype(np.uint64)


def _signed(values: Any) -> Values:
    return np.ascontiguousarray(values).view(np.int32).reshape(np.shape(values))


def _lower(values: Any) -> Values:
    return (np.asarray(values) & LOW).astype(np.uint32)


@executes("MOV", "R2UR")
def move(machine: Machine, decoded: Decoded) -> None:
    machine.write(decoded.operands[0], machine.integer(decoded.operands[1]), decoded.mask)


@executes("SEL")
def select(machine: Machine, decoded: Decoded) -> None:
    a, b = (machine.integer(o) for o in decoded.operands[1:3])
    machine.write(decoded.operands[0], np.where(machine.predicate(decoded.operands[3]), a, b), decoded.mask)


@executes("ISETP")
def compare_integers(machine: Machine, decoded: Decoded) -> None:
    """EX compares upper halves and ends with the result of the lower ones."""
    a, b = (machine.integer(o) for o in decoded.operands[2:4])
    if "U32" not in decoded.modifiers:
        a, b = _signed(a), _signed(b)
    how = comparison_of(decoded)
    found = compare(how, a, b)
    if "EX" in decoded.modifiers:
        lower = machine.predicate(decoded.operands[5])
        strict = {"LE": "LT", "GE": "GT"}.get(how, how)
        found = (
            found | lower
            if how == "NE"
            else found & lower
            if how == "EQ"
            else compare(strict, a, b) | ((a == b) & lower)
        )
    set_predicates(machine, decoded, found)


def _split_carries(decoded: Decoded) -> tuple[list[Operand], list[Operand]]:
    """Predicates that take carries, and the sources after them."""
    rest = decoded.operands[1:]
    count = next(k for k, operand in enumerate(rest) if not operand.is_predicate)
    return rest[:count], rest[count:]


@executes("IADD3")
def add(machine: Machine, decoded: Decoded) -> None:
    """-x is ~x + 1, whose 1 takes part in the carry."""
    carries, sources = _split_carries(decoded)
    total = np.zeros(machine.threads, np.uint64)
    for operand in sources[:3]:
        value = machine.integer(operand)
        if operand.negative and not operand.is_nothing and operand.kind != "integer":
            total += _wide(value - np.uint32(1)) + np.uint64("X" not in decoded.modifiers)
        else:
            total += _wide(value)
    if "X" in decoded.modifiers:
        for operand in sources[3:]:
            total += machine.predicate(operand).astype(np.uint64)
    machine.write(decoded.operands[0], _lower(total), decoded.mask)
    for k, carry in enumerate(carries):
        machine.write(carry, total >> BITS > k, decoded.mask)


@executes("IMAD")
def multiply_add(machine: Machine, decoded: Decoded) -> None:
    modifiers = decoded.modifiers
    carries, (a, b, c, *extra) = _split_carries(decoded)
    if "MOV" in modifiers:
        machine.write(decoded.operands[0], machine.integer(c), decoded.mask)
        return
    x, y = machine.integer(a), machine.integer(b)
    if modifiers & {"WIDE", "HI"}:
        if "U32" in modifiers:
            product = _wide(x) * _wide(y)
        else:
            product = (_signed(x).astype(np.int64) * _signed(y).astype(np.int64)).view(np.uint64)
        addend = _wide(machine.integer(c)) | _wide(machine.integer(c, 1)) << BITS
        total = machine.full(product + addend)
        if "WIDE" in modifiers:
            machine.write_pair(decoded.operands[0], total, decoded.mask)
            for carry in carries:
                machine.write(carry, total < addend, decoded.mask)
        else:
            machine.write(decoded.operands[0], _lower(total >> BITS), decoded.mask)
        return
    total = _wide(x) * _wide(y) + _wide(machine.integer(c))
    if "X" in modifiers:
        total = total + machine.predicate(extra[0])
    machine.write(decoded.operands[0], machine.full(_lower(total)), decoded.mask)


@executes("VIADD")
def add_two(machine: Machine, decoded: Decoded) -> None:
    a, b = (machine.integer(o) for o in decoded.operands[1:3])
    machine.write(decoded.operands[0], a + b, decoded.mask)


@executes("IABS")
def magnitude(machine: Machine, decoded: Decoded) -> None:
    machine.write(decoded.operands[0], np.abs(_signed(machine.integer(decoded.operands[1]))), decoded.mask)


def _least_or_greatest(machine: Machine, decoded: Decoded, a: Values, b: Values, least: Operand) -> None:
    if "U32" not in decoded.modifiers:
        a, b = _signed(a), _signed(b)
    chosen = np.where(machine.predicate(least), np.minimum(a, b), np.maximum(a, b))
    machine.write(decoded.operands[0], chosen, decoded.mask)


@executes("VIMNMX", "IMNMX")
def least_or_greatest(machine: Machine, decoded: Decoded) -> None:
    a, b = (machine.integer(o) for o in decoded.operands[1:3])
    _least_or_greatest(machine, decoded, a, b, decoded.operands[3])


@executes("VIADDMNMX")
def add_least_or_greatest(machine: Machine, decoded: Decoded) -> None:
    a, b, c = (machine.integer(o) for o in decoded.operands[1:4])
    _least_or_greatest(machine, decoded, a + b, c, decoded.operands[4])


def _by_table(table: int, a: Values, b: Values, c: Values) -> Values:
    """Bit k of the table is the result where (a, b, c) are the bits of k."""
    found = np.zeros_like(a & b & c)
    for k in range(8):
        if table >> k & 1:
            found = found | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return found


@executes("LOP3")
def logic(machine: Machine, decoded: Decoded) -> None:
    operands = decoded.operands
    to_predicate = operands[0] if operands[0].is_predicate else None
    d, a, b, c, table, other = operands[1:7] if to_predicate else operands[:6]
    found = _by_table(int(table.value), *(np.asarray(machine.integer(o)) for o in (a, b, c)))
    machine.write(d, found, decoded.mask)
    if to_predicate:
        machine.write(to_predicate, machine.full(found != 0) | machine.predicate(other), decoded.mask)


@executes("PLOP3")
def logic_of_predicates(machine: Machine, decoded: Decoded) -> None:
    sources = [machine.predicate(o) for o in decoded.operands[2:5]]
    found = [_by_table(int(decoded.operands[5 + k].value), *sources) for k in (0, 1)]
    for target, values in zip(decoded.operands[:2], found, strict=True):
        machine.write(target, values, decoded.mask)


@executes("SHF")
def shift(machine: Machine, decoded: Decoded) -> None:
    """The funnel (upper, lower), by at most 64 bits; HI gives the upper half of the result."""
    modifiers = decoded.modifiers
    lower, amount, upper = (machine.full(machine.integer(o)) for o in decoded.operands[1:4])
    count = _wide(amount) & np.uint64(31) if "W" in modifiers else _wide(amount)
    count = np.minimum(count, np.uint64(64 if modifiers & {"U64", "S64"} else 32))
    value = _wide(lower) | _wide(upper) << BITS
    signed = bool(modifiers & {"S32", "S64"})
    if "L" in modifiers:
        moved = np.where(count >= 64, np.uint64(0), value << np.minimum(count, np.uint64(63)))
        result = moved >> BITS if "HI" in modifiers else moved
    elif "HI" in modifiers:  # the upper half by itself
        if signed:
            result = (
                (_signed(upper) >> np.minimum(count, np.uint64(31)).astype(np.int32)).astype(np.int64).view(np.uint64)
            )
        else:
            result = np.where(count >= 32, np.uint64(0), _wide(upper) >> np.minimum(count, np.uint64(31)))
    elif signed:
        result = (value.view(np.int64) >> np.minimum(count, np.uint64(63)).astype(np.int64)).view(np.uint64)
    else:
        result = np.where(count >= 64, np.uint64(0), value >> np.minimum(count, np.uint64(63)))
    machine.write(decoded.operands[0], _lower(result), decoded.mask)


@executes("LEA")
def shift_and_add(machine: Machine, decoded: Decoded) -> None:
    """(a << s) + b; HI of the upper half, SX32 of a sign-extended a."""
    carries, sources = _split_carries(decoded)
    modifiers = decoded.modifiers
    a, b = machine.integer(sources[0]), machine.integer(sources[1])
    if "SX32" in modifiers:
        shifted = (_signed(a).astype(np.int64) << np.int64(int(sources[2].value))).view(np.uint64) >> BITS
        rest = sources[3:]
    elif "HI" in modifiers:
        value = _wide(a) | _wide(machine.integer(sources[2])) << BITS
        shifted = value << np.uint64(int(sources[3].value)) >> BITS
        rest = sources[4:]
    else:
        shifted = _wide(a) << np.uint64(int(sources[2].value)) & LOW
        rest = sources[3:]
    total = (shifted & LOW) + _wide(b)
    if "X" in modifiers and rest:
        total = total + machine.predicate(rest[0])
    total = machine.full(total)
    machine.write(decoded.operands[0], _lower(total), decoded.mask)
    for carry in carries:
        machine.write(carry, total >> BITS != 0, decoded.mask)


@executes("PRMT")
def permute_bytes(machine: Machine, decoded: Decoded) -> None:
    """Each nibble of the selector names a byte of (b, a), or with its top bit the sign of that byte."""
    a, selector, b = (machine.full(machine.integer(o)) for o in decoded.operands[1:4])
    both = _wide(a) | _wide(b) << BITS
    result = np.zeros(machine.threads, np.uint32)
    for k in range(4):
        nibble = selector >> np.uint32(4 * k) & np.uint32(15)
        byte = (both >> _wide(nibble & np.uint32(7)) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * k)
    machine.write(decoded.operands[0], result, decoded.mask)


@executes("SGXT")
def extend(machine: Machine, decoded: Decoded) -> None:
    value, bits = machine.integer(decoded.operands[1]), int(np.max(machine.integer(decoded.operands[2])))
    if "U32" in decoded.modifiers:
        machine.write(decoded.operands[0], value & np.uint32((1 << bits) - 1), decoded.mask)
        return
    machine.write(decoded.operands[0], _signed(value << np.uint32(32 - bits)) >> np.int32(32 - bits), decoded.mask)


@executes("BMSK")
def bit_mask(machine: Machine, decoded: Decoded) -> None:
    at, bits = (_wide(machine.integer(o)) for o in decoded.operands[1:3])
    ones = (np.uint64(1) << np.minimum(bits, np.uint64(32))) - np.uint64(1)
    machine.write(decoded.operands[0], machine.full(_lower(ones << np.minimum(at, np.uint64(32)))), decoded.mask)


@executes("POPC")
def count_bits(machine: Machine, decoded: Decoded) -> None:
    value = machine.full(machine.integer(decoded.operands[1]))
    machine.write(decoded.operands[0], sum(value >> np.uint32(k) & np.uint32(1) for k in range(32)), decoded.mask)


@executes("FLO")
def highest_bit(machine: Machine, decoded: Decoded) -> None:
    value = machine.full(machine.integer(decoded.operands[1]))
    found = np.full(machine.threads, 0xFFFFFFFF, np.uint32)
    for k in range(32):
        found = np.where(value >> np.uint32(k) & np.uint32(1), np.uint32(k), found)
    machine.write(decoded.operands[0], np.uint32(31) - found if "SH" in decoded.modifiers else found, decoded.mask)


@executes("BREV")
def reverse_bits(machine: Machine, decoded: Decoded) -> None:
    value = machine.full(machine.integer(decoded.operands[1]))
    bits = [(value >> np.uint32(k) & np.uint32(1)) << np.uint32(31 - k) for k in range(32)]
    machine.write(decoded.operands[0], np.bitwise_or.reduce(bits), decoded.mask)


@executes("CS2R")
def clock(machine: Machine, decoded: Decoded) -> None:
    """Zero, or a clock."""
    value = 0 if decoded.operands[1].text == "SRZ" else len(machine.trace.steps)
    machine.write(decoded.operands[0], machine.full(np.uint32(value)), decoded.mask)
    if "32" not in decoded.modifiers:
        machine.write(decoded.operands[0], machine.full(np.uint32(0)), decoded.mask, 1)


@executes("S2R", "S2UR")
def special_register(machine: Machine, decoded: Decoded) -> None:
    values: dict[str, Any] = {
        "SR_TID.X": machine.thread,
        "SR_CTAID.X": machine.block,
        "SR_CgaCtaId": machine.rank,
        "SR_CgaSize": np.uint32(machine.blocks),
        "SR_LANEID": machine.lane.astype(np.uint32),
        "SR_SWINHI": np.uint32(SHARED_WINDOW),
        **dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z"), np.uint32(0)),
    }
    machine.write(decoded.operands[0], machine.full(values[decoded.operands[1].text]), decoded.mask)


@executes("P2R")
def from_predicates(machine: Machine, decoded: Decoded) -> None:
    bits = np.zeros(machine.threads, np.uint32)
    for k in range(7):
        bits |= machine.files["P"][k].astype(np.uint32) << np.uint32(k)
    wanted = np.uint32(int(decoded.operands[3].value) & 0xFFFFFFFF)
    rest = machine.integer(decoded.operands[2]) & ~wanted
    machine.write(decoded.operands[0], bits & wanted | rest, decoded.mask)


@executes("R2P")
def to_predicates(machine: Machine, decoded: Decoded) -> None:
    bits, wanted = machine.full(machine.integer(decoded.operands[1])), int(decoded.operands[2].value)
    for k in range(7):
        if wanted >> k & 1:
            machine.write(Operand("P", k), bits >> np.uint32(k) & np.uint32(1) != 0, decoded.mask)


@executes("LDC")
def load_constant(machine: Machine, decoded: Decoded) -> None:
    size = decoded.instruction.bytes_per_thread
    words = [machine.full(machine.constant(decoded.operands[1], size, k)).copy() for k in range(max(1, size // 4))]
    for k, word in enumerate(words):
        machine.write(decoded.operands[0], word, decoded.mask, k)


@executes("BMOV")
def move_reconvergence(machine: Machine, decoded: Decoded) -> None:
    """The threads of a reconvergence point to a register as bits of the lanes, or back."""
    to, source = decoded.operands[:2]
    active = machine.active(decoded.mask)
    if to.kind == "B":
        bits = machine.full(machine.integer(source))
        machine.write(to, bits >> machine.lane.astype(np.uint32) & np.uint32(1) != 0, active)
        return
    members = machine.files["B"][source.number].reshape(-1, 32)
    bits = (members.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
    machine.write(to, np.repeat(bits, 32), decoded.mask)
    if "CLEAR" in decoded.modifiers:
        machine.files["B"][source.number][active] = False
