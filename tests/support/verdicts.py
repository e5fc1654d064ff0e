"""What a slow check has found, kept in build/verdicts for as long as nothing that it depends on has changed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")


@functools.cache
def _digest(trees: tuple[Path, ...]) -> str:
    """Of the names and contents of the sources: they do not change while the tests run."""
    found = hashlib.sha256()
    for tree in trees:
        for path in [tree] if tree.is_file() else sorted(p for p in tree.rglob("*") if p.suffix in SUFFIXES):
            found.update(f"{path}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


def kept(
    name: str, trees: Iterable[Path], said: Iterable[object], check: Callable[[], Any], home: Path | None = None
) -> Any:
    """``check()``, or what it returned when the files below ``trees`` and the texts ``said`` were the same.

    ``said`` names what is checked and the versions of the tools. A check that raises is not kept; `make clean` forgets
    the others.
    """
    digest = hashlib.sha256(json.dumps([_digest(tuple(trees)), *map(str, said)]).encode()).hexdigest()[:32]
    file = (home or ROOT / "build" / "verdicts") / name / f"{digest}.json"
    if file.exists():
        return json.loads(file.read_text())
    found = check()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(file)
    return found
