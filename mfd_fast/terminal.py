"""Text that every terminal can print."""

from __future__ import annotations

import codecs
import sys

PLAIN = {"µ": "u", "≥": ">=", "≤": "<=", "±": "+-", "×": "x", "−": "-", "–": "-", "…": "...", "²": "^2"}
_HANDLER = "mfd_fast.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error(_HANDLER, _plain)


def accept_any_text() -> None:
    """Writes what the terminal's encoding lacks in plain characters (µs as us), where it would raise."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" or stream is sys.stderr:
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors=_HANDLER)
