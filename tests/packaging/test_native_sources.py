"""The C++ sources: headers that stand alone, folders that fit a screen."""

import collections
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HEADERS = [p for tree in ("bindings", "common", "cpu") for p in sorted((CSRC / tree).rglob("*.h"))]
#: Files of a folder, at most.
SIBLINGS = 12


def errors(header: Path) -> str:
    """What the compiler says of a translation unit that includes one header."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ("-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-")
    folders = (CSRC, pybind11.get_include(), sysconfig.get_path("include"))
    done = subprocess.run(
        [*compiler, *(f"-I{folder}" for folder in folders), *flags],
        input=f'#include "{header}"\n',
        capture_output=True,
        text=True,
    )
    return done.stderr if done.returncode else ""


def test_every_header_stands_alone(tmp_path):
    assert len(HEADERS) > 30
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(HEADERS, pool.map(errors, HEADERS), strict=True))
    assert {str(path.relative_to(ROOT)): text[:500] for path, text in found.items() if text} == {}
    leaning = tmp_path / "leaning.h"
    leaning.write_text("#pragma once\nnamespace mfd {\nint rows_of(const RowProblem& problem);\n}\n")
    assert "RowProblem" in errors(leaning)


def test_folders_have_few_files():
    counts = collections.Counter(
        p.parent.relative_to(ROOT).as_posix()
        for tree in ("bindings", "common", "cpu")
        for p in (CSRC / tree).rglob("*")
        if p.is_file()
    )
    assert len(counts) > 10
    assert {folder: n for folder, n in counts.items() if n > SIBLINGS} == {}
