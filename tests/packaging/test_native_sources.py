"""The C++ sources: headers that stand alone, folders that fit a screen."""

import collections
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HOST = [p for tree in ("bindings", "common", "cpu") for p in sorted((CSRC / tree).rglob("*.h"))]
CUDA = [
    p for tree in (CSRC, ROOT / "kernels") for p in sorted((tree / "cuda").rglob("*")) if p.suffix in (".h", ".cuh")
]
#: Files of a folder, at most.
SIBLINGS = 12


def errors(header: Path) -> str:
    """What the compiler says of a translation unit that includes one header."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ("-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-x", "c++", "-")
    # The emulator's CUDA runtime does for the headers of CUDA.
    folders = (
        CSRC,
        ROOT / "kernels",
        ROOT / "tests" / "cuda_emulator",
        pybind11.get_include(),
        sysconfig.get_path("include"),
    )
    done = subprocess.run(
        [*compiler, *(f"-I{folder}" for folder in folders), *flags],
        input=f'#include "{header}"\n',
        capture_output=True,
        text=True,
    )
    return done.stderr if done.returncode else ""


def all_errors(headers: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(headers, pool.map(errors, headers), strict=True))
    return {str(path.relative_to(ROOT)): text[:500] for path, text in found.items() if text}


@pytest.mark.rest
def test_every_header_stands_alone(tmp_path):
    assert len(HOST) > 30
    assert all_errors(HOST) == {}
    leaning = tmp_path / "leaning.h"
    leaning.write_text("#pragma once\nnamespace mfd {\nint rows_of(const RowProblem& problem);\n}\n")
    assert "RowProblem" in errors(leaning)


@pytest.mark.rest
def test_every_header_of_cuda_stands_alone():
    assert len(CUDA) > 30
    assert all_errors(CUDA) == {}


def test_folders_have_few_files():
    counts = collections.Counter(
        p.parent.relative_to(ROOT).as_posix()
        for tree in (CSRC, ROOT / "kernels" / "cuda")
        for p in tree.rglob("*")
        if p.is_file()
    )
    assert len(counts) > 20
    assert {folder: n for folder, n in counts.items() if n > SIBLINGS} == {}
