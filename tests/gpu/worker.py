"""A process of `make gpu` that works through the items of a part: facts, smoke, speed, compare, sanitizer.

    python worker.py smoke --device cuda --share triton:0/3 --until 1790000000 --journal results/journal.jsonl

Any exception ends its item alone; a device that no longer answers ends the process with status ``journal.LOST``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from journal import GREEN, LEFT_OUT, LOST, RED, Journal, die_with_the_parent, last_line, mark

#: What an item returns: ``outcome``, and whatever else its line of the journal is to have.
Said = dict[str, Any]
Items = Mapping[str, Callable[[], Said]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--share", default="all:0/1", help="BACKEND:I/N, every N-th item of a backend")
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--journal", type=Path, required=True)
    asked = parser.parse_args()
    die_with_the_parent()
    import items

    journal = Journal(asked.journal)
    return work(asked.part, items.of(asked.part, asked.device, asked.share, asked.until), journal, asked)


def work(part: str, found: Items, journal: Journal, asked: Any, lost: Callable[[], bool] | None = None) -> int:
    """Runs what the journal does not have; returns the exit status."""
    journal.plan(part, asked.share, len(found))
    done = journal.ended(part)
    for name, run in found.items():
        if name in done:
            continue
        if time.time() > asked.until:
            break
        mark(name)
        begin = time.time()
        try:
            said = run()
        except Exception as error:
            traceback.print_exc()
            said = {"outcome": RED, "why": last_line(error)}
        gone = said["outcome"] != GREEN and (lost or device_is_lost)()
        if gone:
            said["why"] = f"{said.get('why', '')}; the device no longer answers to this process"
        seconds = round(time.time() - begin, 3)
        journal.end(part, name, said.pop("outcome"), said.pop("why", ""), seconds=seconds, **said)
        if gone:
            sys.stdout.flush()
            return LOST
        mark(None)
    return 0


def device_is_lost() -> bool:
    """Whether this process has a GPU that refuses everything; a process without torch has none."""
    if "torch" not in sys.modules:
        return False
    import torch

    from mfd_fast.bench import machine

    return torch.cuda.is_available() and machine.is_lost(torch.device("cuda"))


def outcome_of(wrong: str, **more: Any) -> Said:
    """Green, or red for a reason."""
    return {"outcome": RED if wrong else GREEN, "why": wrong, **more}


def left_out(why: str) -> Said:
    return {"outcome": LEFT_OUT, "why": why}


if __name__ == "__main__":
    end = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end)  # not through destructors that wait for a device
