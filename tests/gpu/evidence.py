"""Writes the evidence: the machine, every part's verdict, every sample of the benchmark, as one result file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from mfd_fast.bench import machine, results


def scrubbed(value: Any, places: tuple[str, ...]) -> Any:
    """Without the names of this machine's folders."""
    if isinstance(value, dict):
        return {k: scrubbed(v, places) for k, v in value.items()}
    if isinstance(value, list):
        return [scrubbed(v, places) for v in value]
    if isinstance(value, str):
        for place in places:
            value = value.replace(place, "…")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checks", type=Path, required=True, help="the parts' verdicts")
    parser.add_argument("--bench", type=Path, help="the benchmark's result file")
    parser.add_argument("--device", required=True)
    parser.add_argument("--commit", help="where there is no repository to ask")
    parser.add_argument("--out", type=Path, required=True, action="append", help="folders")
    parser.add_argument("--root", required=True)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    found: dict[str, Any] = {"schema": results.SCHEMA, "machine": machine.facts(device), "ceilings": {}}
    found |= {
        "suite": "gpu",
        "flush": True,
        "seconds": 0.0,
        "results": [],
        "left_out": [],
        "missing": {},
        "growth": None,
    }
    if asked.bench and asked.bench.exists():
        found = results.load(asked.bench)
    if asked.commit:
        found["machine"]["commit"] = asked.commit
    if device.type == "cuda":
        found["machine"]["compute_capability"] = list(torch.cuda.get_device_capability(device))
    found["checks"] = json.loads(asked.checks.read_text())
    found = scrubbed(found, (asked.root, sys.prefix, str(Path.home())))
    for folder in asked.out:
        path = folder / f"{machine.slug(found['machine'])}.json"
        results.save(found, path)
        print(path)


if __name__ == "__main__":
    main()
