"""Floating-point instructions. A float32 result is computed in float64 (or longer) and rounded once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import Decoded, Machine, Values, executes

LEAST_NORMAL = np.float32(2.0**-126)


def to_bfloat16(values: Values) -> Values:
    """float32 -> the 16 bits, round to nearest even, as uint32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint32)


def from_bfloat16(bits: Values) -> Values:
    return np.ascontiguousarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_half(values: Values) -> Values:
    return values.astype(np.float16).view(np.uint16).astype(np.uint32)


def rounded(exact: Any, modifiers: frozenset[str]) -> Values:
    """To float32, with the instruction's direction, saturation and flushing."""
    exact = np.asarray(exact)
    value = exact.astype(np.float32)
    wide = value.astype(np.longdouble)
    if "RM" in modifiers:
        value = np.where(wide > exact, np.nextafter(value, np.float32(-np.inf)), value)
    if "RP" in modifiers:
        value = np.where(wide < exact, np.nextafter(value, np.float32(np.inf)), value)
    if "RZ" in modifiers:
        value = np.where(np.abs(wide) > np.abs(exact), np.nextafter(value, np.float32(0)), value)
    if "SAT" in modifiers:
        value = np.where(np.isnan(value), np.float32(0), np.clip(value, np.float32(0), np.float32(1)))
    if "FTZ" in modifiers:
        value = np.where(np.abs(value) < LEAST_NORMAL, value * np.float32(0), value)
    return value


def _wide(machine: Machine, decoded: Decoded, first: int, count: int) -> list[Values]:
    return [np.asarray(machine.single(o), np.float64) for o in decoded.operands[first : first + count]]


def _write_single(machine: Machine, decoded: Decoded, exact: Any) -> None:
    value = machine.full(rounded(exact, decoded.modifiers)).astype(np.float32)
    machine.write(decoded.operands[0], value, decoded.mask)


@executes("FADD")
def add(machine: Machine, decoded: Decoded) -> None:
    a, b = _wide(machine, decoded, 1, 2)
    _write_single(machine, decoded, a + b)


@executes("FMUL")
def multiply(machine: Machine, decoded: Decoded) -> None:
    a, b = _wide(machine, decoded, 1, 2)
    _write_single(machine, decoded, a * b)


@executes("FFMA")
def multiply_add(machine: Machine, decoded: Decoded) -> None:
    a, b, c = _wide(machine, decoded, 1, 3)
    _write_single(machine, decoded, a * b + c)


@executes("FSEL")
def select(machine: Machine, decoded: Decoded) -> None:
    a, b = (machine.full(machine.single(o)).astype(np.float32) for o in decoded.operands[1:3])
    machine.write(decoded.operands[0], np.where(machine.predicate(decoded.operands[3]), a, b), decoded.mask)


@executes("FMNMX")
def least_or_greatest(machine: Machine, decoded: Decoded) -> None:
    a, b = (machine.full(machine.single(o)) for o in decoded.operands[1:3])
    keeps_nan = "NAN" in decoded.modifiers
    least = np.minimum(a, b) if keeps_nan else np.fmin(a, b)
    greatest = np.maximum(a, b) if keeps_nan else np.fmax(a, b)
    value = np.where(machine.predicate(decoded.operands[3]), least, greatest).astype(np.float32)
    machine.write(decoded.operands[0], value, decoded.mask)


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "GT": np.greater,
    "GE": np.greater_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def compare(how: str, a: Values, b: Values) -> Values:
    """With U at the end, NaN compares as true."""
    if how in ("NAN", "NUM"):
        return (np.isnan(a) | np.isnan(b)) == (how == "NAN")
    unordered = how not in COMPARISONS
    found = COMPARISONS[how[:-1] if unordered else how](a, b)
    if not np.issubdtype(np.asarray(a).dtype, np.floating):
        return found
    nan = np.isnan(a) | np.isnan(b)
    return found | nan if unordered else found & ~nan


def set_predicates(machine: Machine, decoded: Decoded, found: Values) -> None:
    """Of a comparison: the result and its opposite, each joined with a further predicate."""
    join = (
        np.logical_or if "OR" in decoded.modifiers else np.logical_xor if "XOR" in decoded.modifiers else np.logical_and
    )
    other = machine.predicate(decoded.operands[4])
    found = machine.full(found)
    both = join(found, other), join(~found, other)
    machine.write(decoded.operands[0], both[0], decoded.mask)
    machine.write(decoded.operands[1], both[1], decoded.mask)


def comparison_of(decoded: Decoded) -> str:
    return decoded.instruction.modifiers[0]


@executes("FSETP")
def compare_singles(machine: Machine, decoded: Decoded) -> None:
    a, b = (machine.single(o) for o in decoded.operands[2:4])
    set_predicates(machine, decoded, compare(comparison_of(decoded), a, b))


@executes("FSET")
def compare_to_number(machine: Machine, decoded: Decoded) -> None:
    """1.0 or, without BF, all bits where both the comparison and a predicate hold, else 0."""
    modifiers = decoded.instruction.modifiers
    how = next(m for m in modifiers if m not in ("BF", "FTZ", "AND"))
    a, b = (machine.single(o) for o in decoded.operands[1:3])
    holds = machine.full(compare(how, a, b)) & machine.full(machine.predicate(decoded.operands[3]))
    yes = np.uint32(0x3F800000) if "BF" in modifiers else np.uint32(0xFFFFFFFF)
    machine.write(decoded.operands[0], np.where(holds, yes, np.uint32(0)), decoded.mask)


@executes("DSETP")
def compare_doubles(machine: Machine, decoded: Decoded) -> None:
    a, b = (machine.double(o) for o in decoded.operands[2:4])
    how = comparison_of(decoded)
    if how in ("MAX", "MIN"):  # whether a is chosen, and whether neither is a number
        better = a > b if how == "MAX" else a < b
        machine.write(decoded.operands[0], machine.full(~np.isnan(a) & (better | np.isnan(b))), decoded.mask)
        machine.write(decoded.operands[1], machine.full(np.isnan(a) & np.isnan(b)), decoded.mask)
        return
    set_predicates(machine, decoded, compare(how, a, b))


@executes("FCHK")
def check_division(machine: Machine, decoded: Decoded) -> None:
    """Whether a/b needs the slow road: operands or quotient near the ends of the exponents."""
    bits = [
        np.ascontiguousarray(machine.full(machine.single(o)), np.float32).view(np.uint32) for o in decoded.operands[1:3]
    ]
    a, b = ((x >> np.uint32(23) & np.uint32(255)).astype(np.int32) for x in bits)
    slow = (b <= 1) | (b >= 253) | (a == 255) | (a < 25) | (a - b >= 126) | (b - a >= 125)
    machine.write(decoded.operands[0], slow, decoded.mask)


@executes("DADD")
def add_doubles(machine: Machine, decoded: Decoded) -> None:
    a, b = (machine.double(o) for o in decoded.operands[1:3])
    machine.write_pair(decoded.operands[0], a + b, decoded.mask)


@executes("DMUL")
def multiply_doubles(machine: Machine, decoded: Decoded) -> None:
    a, b = (machine.double(o) for o in decoded.operands[1:3])
    machine.write_pair(decoded.operands[0], a * b, decoded.mask)


@executes("DFMA")
def multiply_add_doubles(machine: Machine, decoded: Decoded) -> None:
    a, b, c = (np.asarray(machine.double(o)).astype(np.longdouble) for o in decoded.operands[1:4])
    machine.write_pair(decoded.operands[0], (a * b + c).astype(np.float64), decoded.mask)


SPECIAL_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "EX2": lambda x: np.where(np.exp2(x) < 2.0**-126, 0.0, np.exp2(x)),
    "LG2": np.log2,
    "RCP": lambda x: 1.0 / x,
    "RSQ": lambda x: 1.0 / np.sqrt(x),
    "SQRT": np.sqrt,
    "TANH": np.tanh,
}


@executes("MUFU")
def special_function(machine: Machine, decoded: Decoded) -> None:
    """To the last bit of float32 here; the hardware is off by up to 2 of them."""
    how = comparison_of(decoded)
    if how in ("RCP64H", "RSQ64H"):  # from and to the upper half of a float64
        upper = machine.full(machine.integer(decoded.operands[1])).astype(np.uint64)
        x = (upper << np.uint64(32)).view(np.float64)
        y = SPECIAL_FUNCTIONS[how[:3]](x)
        machine.write(decoded.operands[0], (y.view(np.uint64) >> np.uint64(32)).astype(np.uint32), decoded.mask)
        return
    x = machine.full(machine.single(decoded.operands[1])).astype(np.float64)
    machine.write(decoded.operands[0], SPECIAL_FUNCTIONS[how](x).astype(np.float32), decoded.mask)


@executes("F2F")
def convert(machine: Machine, decoded: Decoded) -> None:
    to, source = decoded.instruction.modifiers[:2]
    read = {"F64": machine.double, "F32": machine.single}[source]
    value = machine.full(read(decoded.operands[1]))
    if to == "F64":
        machine.write_pair(decoded.operands[0], value.astype(np.float64), decoded.mask)
        return
    single = rounded(value, decoded.modifiers)
    result = {"F32": lambda: single, "BF16": lambda: to_bfloat16(single), "F16": lambda: to_half(value)}[to]()
    machine.write(decoded.operands[0], result, decoded.mask)


@executes("F2FP")
def convert_and_pack(machine: Machine, decoded: Decoded) -> None:
    narrow = to_bfloat16 if "BF16" in decoded.modifiers else to_half
    high, low = (narrow(machine.full(machine.single(o))) for o in decoded.operands[1:3])
    machine.write(decoded.operands[0], low | high << np.uint32(16), decoded.mask)


def _halves(machine: Machine, operand: Any, bfloat: bool) -> list[Values]:
    """The two 16-bit numbers of a register, as float32."""
    bits = machine.full(machine.integer(dataclasses.replace(operand, negative=False, absolute=False)))
    parts = [bits & np.uint32(0xFFFF), bits >> np.uint32(16)]
    if operand.half in ("H0_H0", "H1_H1"):
        parts = [parts[int(operand.half[1])]] * 2
    widened = [from_bfloat16(x) if bfloat else x.astype(np.uint16).view(np.float16).astype(np.float32) for x in parts]
    return [machine._signed(x, operand) for x in widened]


def _pairs(machine: Machine, decoded: Decoded, bfloat: bool) -> list[list[Values]]:
    """(low, high) of every source, in float64. A pair of numbers, (high, low), may stand in place of a register."""
    values, left = [], list(decoded.operands[1:])
    while left:
        operand = left.pop(0)
        if operand.kind in ("float", "integer"):
            pair = [np.float32(o.value if o.kind == "float" else 0) for o in (left.pop(0), operand)]
            values.append([machine.full(x).astype(np.float64) for x in pair])
        else:
            values.append([half.astype(np.float64) for half in _halves(machine, operand, bfloat)])
    return values


@executes("HFMA2", "HADD2", "HMUL2")
def compute_halves(machine: Machine, decoded: Decoded) -> None:
    """HADD2.F32 converts: -0 + x, x the half of a register."""
    if "F32" in decoded.modifiers:
        a, b = decoded.operands[1:3]
        machine.write(decoded.operands[0], machine.full(machine.single(b if a.is_nothing else a)), decoded.mask)
        return
    bfloat = any("BF16" in m for m in decoded.modifiers)
    narrow = to_bfloat16 if bfloat else to_half
    values = _pairs(machine, decoded, bfloat)
    compute: Callable[..., Values] = {
        "HFMA2": lambda a, b, c: a * b + c,
        "HADD2": lambda a, b: a + b,
        "HMUL2": lambda a, b: a * b,
    }[decoded.instruction.name]
    low, high = (narrow(compute(*(value[k] for value in values)).astype(np.float32)) for k in (0, 1))
    machine.write(decoded.operands[0], low | high << np.uint32(16), decoded.mask)


@executes("HMNMX2", "VHMNMX")
def least_or_greatest_halves(machine: Machine, decoded: Decoded) -> None:
    bfloat = any("BF16" in modifier for modifier in decoded.modifiers)
    chosen = np.fmin, np.fmax
    least = machine.predicate(decoded.operands[-1])
    columns = zip(*(_halves(machine, o, bfloat) for o in decoded.operands[1:-1]), strict=True)
    narrow = to_bfloat16 if bfloat else to_half
    low, high = (narrow(np.where(least, *(how.reduce(values) for how in chosen))) for values in columns)
    machine.write(decoded.operands[0], low | high << np.uint32(16), decoded.mask)


@executes("HSETP2")
def compare_halves(machine: Machine, decoded: Decoded) -> None:
    """A predicate for each half."""
    if {"H_AND", "OR", "XOR"} & decoded.modifiers:
        raise NotImplementedError(decoded.instruction.text)
    bfloat = any("BF16" in modifier for modifier in decoded.modifiers)
    how = next(m for m in decoded.instruction.modifiers if m not in ("BF16_V2", "FTZ", "AND"))
    other = machine.predicate(decoded.operands[4])
    halves = [_halves(machine, operand, bfloat) for operand in decoded.operands[2:4]]
    for k in (0, 1):
        found = machine.full(compare(how, halves[0][k], halves[1][k])) & other
        machine.write(decoded.operands[k], found, decoded.mask)


@executes("FRND")
def round_to_integer(machine: Machine, decoded: Decoded) -> None:
    how = next((name for name in ("FLOOR", "CEIL", "TRUNC") if name in decoded.modifiers), "RINT")
    function = {"FLOOR": np.floor, "CEIL": np.ceil, "TRUNC": np.trunc, "RINT": np.rint}[how]
    machine.write(decoded.operands[0], machine.full(function(machine.single(decoded.operands[1]))), decoded.mask)


@executes("I2FP", "I2F")
def from_integer(machine: Machine, decoded: Decoded) -> None:
    source, modifiers = decoded.operands[1], decoded.modifiers
    value = np.ascontiguousarray(machine.full(machine.integer(source)))
    if modifiers & {"U64", "S64"}:
        upper = machine.full(machine.integer(source, 1)).astype(np.uint64)
        value = value.astype(np.uint64) | upper << np.uint64(32)
        value = value.view(np.int64) if "S64" in modifiers else value
    elif "U8" in modifiers:
        value = value & np.uint32(255)
    elif "U16" in modifiers:
        value = value & np.uint32(65535)
    elif "U32" not in modifiers:
        value = value.view(np.int32)
    if "F64" in modifiers:
        machine.write_pair(decoded.operands[0], value.astype(np.float64), decoded.mask)
        return
    machine.write(decoded.operands[0], rounded(value.astype(np.longdouble), modifiers), decoded.mask)


@executes("F2I")
def to_integer(machine: Machine, decoded: Decoded) -> None:
    modifiers, source = decoded.modifiers, decoded.operands[1]
    value = machine.double(source) if "F64" in modifiers else np.asarray(machine.single(source), np.float64)
    how = next((name for name in ("FLOOR", "CEIL", "TRUNC") if name in modifiers), "RINT")
    value = {"FLOOR": np.floor, "CEIL": np.ceil, "TRUNC": np.trunc, "RINT": np.rint}[how](machine.full(value))
    value = np.where(np.isnan(value), 0, value)
    if "U64" in modifiers:
        whole = np.clip(value, 0, 18446744073709549568.0).astype(np.uint64)
        machine.write_pair(decoded.operands[0], whole, decoded.mask)
        return
    if "S64" in modifiers:
        whole = np.clip(value, -9.223372036854775e18, 9.223372036854774e18).astype(np.int64)
        machine.write_pair(decoded.operands[0], whole, decoded.mask)
        return
    least, most = (0.0, 4294967295.0) if "U32" in modifiers else (-2147483648.0, 2147483647.0)
    machine.write(decoded.operands[0], np.clip(value, least, most).astype(np.int64).astype(np.uint32), decoded.mask)


@executes("HMMA")
def matrix_product(machine: Machine, decoded: Decoded) -> None:
    """D[16, 8] = A[16, 16]*B[16, 8] + C of bfloat16 with float32 sums, a product per warp."""
    if not {"16816", "F32", "BF16"} <= decoded.modifiers:
        raise NotImplementedError(decoded.instruction.text)
    d, a, b, c = decoded.operands[:4]
    warps, registers = machine.warps, machine.files["R"]
    group, within = np.arange(32) // 4, np.arange(32) % 4

    def pairs(number: int) -> list[Values]:
        return [
            x.reshape(warps, 32)
            for x in (
                from_bfloat16(registers[number] & np.uint32(0xFFFF)),
                from_bfloat16(registers[number] >> np.uint32(16)),
            )
        ]

    left, right, sums = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    for k in range(4):
        row, column = group + 8 * (k & 1), 2 * within + 8 * (k >> 1)
        left[:, row, column], left[:, row, column + 1] = pairs(a.number + k)
    for k in range(2):
        row = 2 * within + 8 * k
        right[:, row, group], right[:, row + 1, group] = pairs(b.number + k)
    for k in range(4):
        if not c.is_nothing:
            sums[:, group + 8 * (k >> 1), 2 * within + k % 2] = (
                registers[c.number + k].view(np.float32).reshape(warps, 32)
            )
    product = (left @ right + sums).astype(np.float32)
    for k in range(4):
        own = np.ascontiguousarray(product[:, group + 8 * (k >> 1), 2 * within + k % 2].reshape(-1))
        machine.write(d, own, decoded.mask, k)
