"""Counts the kernels of the table, prints it, and with ``--write`` keeps it in counts.json.

python -m machine_code [--write | --kept] [words that a case's name has ...]
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COUNTS = HERE / "counts.json"
COLUMNS = ("instructions_per_pair", "registers", "shared_bytes", "resident_blocks", "grid_blocks", "bound", "simulated")


def compiler() -> str:
    text = subprocess.run(
        [shutil.which("nvcc") or "nvcc", "--version"], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"V([\d.]+)", text)
    return f"nvcc {found[1] if found else '?'}"


def name_of(record: dict[str, Any]) -> str:
    """What a record is about."""
    op = "" if record["op"] == "distill_loss" else record["op"]
    shape = "x".join(map(str, record["shape"]))
    parts = [record["backend"], op, record["divergence"] or "", shape, record["dtype"]]
    return " ".join(filter(None, [*parts, "labels" if record["labels"] else ""]))


def line(record: dict[str, Any]) -> str:
    fields = " ".join(f"{record[column]:>8}" for column in COLUMNS)
    classes = record["by_class"]
    shown = " ".join(
        f"{kind} {classes[kind]:.1f}" for kind in ("fma", "alu", "mufu", "fp64", "conversion") if kind in classes
    )
    return f"{name_of(record):46} {fields}  {record['bound_by']:7} {shown}"


def head() -> str:
    names = ("instr", "regs", "shared", "resident", "grid", "bound", "sim")
    return f"{'':46} " + " ".join(f"{name:>8}" for name in names)


def kept() -> dict[str, Any]:
    return json.loads(COUNTS.read_text()) if COUNTS.exists() else {"compilers": {}, "records": []}


def write(document: dict[str, Any]) -> None:
    """A record a line."""
    records = ",\n".join("  " + json.dumps(record) for record in document["records"])
    text = f'{{"compilers": {json.dumps(document["compilers"])},\n "records": [\n{records}\n]}}\n'
    COUNTS.write_text(text)


def main(words: list[str]) -> None:
    from .cases import CASES
    from .rows import measure

    keep = "--write" in words
    if "--kept" in words:
        print(head(), *map(line, kept()["records"]), sep="\n")
        return
    words = [word for word in words if not word.startswith("--")]
    document = kept()
    document["compilers"]["cuda"] = compiler()
    records = {name_of(record): record for record in document["records"]}
    print(head(), flush=True)
    for case in CASES:
        if all(word in case.name.split() for word in words):
            record = measure(case)
            records[name_of(record)] = record
            print(line(record), flush=True)
            if keep:
                write({**document, "records": list(records.values())})


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    if "--kept" not in sys.argv:
        import cuda_emulator

        os.environ.setdefault("MFD_FAST_CUDA_EMULATOR", str(cuda_emulator.module()))
    import torch

    torch.set_num_threads(1)
    main(sys.argv[1:])
