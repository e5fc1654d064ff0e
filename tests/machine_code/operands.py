"""What an instruction's arguments mean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf, nan

#: Numbers of the registers that read as 0 (R, UR) or true (P, UP).
ZERO = {"R": 255, "UR": 63, "P": 7, "UP": 7}
REGISTER = re.compile(r"^(UR|UP|R|P|B)(\d+|Z|T)(\.\w+)?$")
CONSTANT = re.compile(r"^c\[0x([0-9a-f]+)\]\[(.*)\](\.\w+)?$")
DECIMAL = re.compile(r"^-?(\d+\.?\d*(e[-+]?\d+)?|\.\d+)$", re.IGNORECASE)
SPECIAL_NUMBERS = {"+INF": inf, "INF": inf, "-INF": -inf, "QNAN": nan, "+QNAN": nan, "-QNAN": nan}
TERM = re.compile(r"[+-]?[^+-]+")
ADDRESS_TERM = re.compile(r"^(UR|R)(\d+|Z)((?:\.\w+)*)$")


@dataclass(frozen=True)
class Base:
    """A register in an address."""

    kind: str
    number: int
    wide: bool  # a pair of registers
    factor: int


@dataclass(frozen=True)
class Operand:
    """``kind``: a register file (R, UR, P, UP, B), "constant", "integer", "float", "memory", "special" or "text"."""

    kind: str
    number: int = 0  # of the register or of the constant bank
    value: float = 0  # of an immediate
    offset: int = 0  # of a constant or an address
    bases: tuple[Base, ...] = ()
    negative: bool = False
    absolute: bool = False
    inverted: bool = False
    half: str = ""  # H0_H0, H1_H1
    text: str = ""

    @property
    def is_predicate(self) -> bool:
        return self.kind in ("P", "UP")

    @property
    def is_nothing(self) -> bool:
        """Whether this is a register that swallows what is written."""
        return self.number == ZERO.get(self.kind, -1)


def _address(text: str, generic: bool) -> tuple[tuple[Base, ...], int]:
    bases, offset = [], 0
    for term in TERM.findall(text):
        body = term.lstrip("+-")
        register = ADDRESS_TERM.match(body)
        if not register:
            offset += (-1 if term[0] == "-" else 1) * int(body, 16)
        elif register[2] != "Z":
            factor = re.search(r"\.X(\d+)", register[3])
            wide = ".64" in register[3] or (generic and register[1] == "R")
            bases.append(Base(register[1], int(register[2]), wide, int(factor[1]) if factor else 1))
    return tuple(bases), offset


def parse(text: str, generic: bool = False) -> Operand:
    """``generic``: registers of an address are pairs, as of LD and ST."""
    body = text.replace(".reuse", "").strip()
    if body.startswith(("desc[", "[")):
        bases, offset = _address(re.search(r"\[([^\[\]]*)\]$", body)[1], generic)  # type: ignore[index]
        return Operand("memory", offset=offset, bases=bases)
    if body in SPECIAL_NUMBERS:
        return Operand("float", value=SPECIAL_NUMBERS[body])
    if re.match(r"^-?0x[0-9a-f]+$", body):
        return Operand("integer", value=int(body, 16))
    if DECIMAL.match(body):
        return Operand("float", value=float(body))
    if body.startswith("SR"):
        return Operand("special", text=body)
    inverted = body.startswith(("!", "~"))
    body = body[1:] if inverted else body
    negative = body.startswith("-")
    body = body[1:] if negative else body
    inverted = inverted or body.startswith("~")
    body = body.lstrip("~")
    absolute = body.startswith("|")
    body = body.strip("|")
    flags = {"negative": negative, "absolute": absolute, "inverted": inverted}
    register = REGISTER.match(body)
    if register:
        number = ZERO[register[1]] if register[2] in "ZT" else int(register[2])
        return Operand(register[1], number, half=(register[3] or "").lstrip("."), **flags)
    constant = CONSTANT.match(body)
    if constant:
        bases, offset = _address(constant[2], False)
        return Operand("constant", int(constant[1], 16), offset=offset, bases=bases, **flags)
    if re.match(r"^0x[0-9a-f]+$", body):
        return Operand("integer", value=int(body, 16), **flags)
    return Operand("text", text=body)
