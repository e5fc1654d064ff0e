"""What the tree promises about itself: file sizes, layers, doctests."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import mfd_fast

ROOT = pathlib.Path(__file__).parents[2]
TREES = ("mfd_fast", "kernels", "csrc", "benchmarks", "tests")
SOURCES = [
    path
    for tree in TREES
    for path in sorted((ROOT / tree).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cuh", ".cu") and "__pycache__" not in path.parts
]


def test_files_are_short():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in SOURCES}
    assert len(lengths) > 50
    assert {path: n for path, n in lengths.items() if n > 500} == {}
    shipped = sorted(n for path, n in lengths.items() if path.parts[0] != "tests")
    assert shipped[int(0.9 * len(shipped))] <= 300


@pytest.mark.parametrize(
    ("tree", "forbidden"),
    [
        ("kernels", r"^\s*(import|from) torch|#include <(torch|ATen)"),
        ("csrc", r"#include [<\"](torch|ATen|c10)"),
        ("mfd_fast/reference", r"(import|from) .*(backends|kernels|\.ops|_C\b)"),
        ("mfd_fast/ops", r"(import|from) .*(kernels|_C\b)"),
    ],
)
def test_layers(tree, forbidden):
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        if path.is_relative_to(ROOT / tree)
        for line in path.read_text().splitlines()
        if re.search(forbidden, line)
    ]
    assert found == []


def test_pybind11_is_included_by_the_bindings_alone():
    users = {p for p in SOURCES if p.is_relative_to(ROOT / "csrc") and "pybind11" in p.read_text()}
    assert {p for p in SOURCES if p.parent == ROOT / "csrc" / "bindings" and p.suffix == ".cpp"} < users
    assert all(p.parent.name == "bindings" or p.stem.endswith("bindings") for p in users)


def modules():
    found = pkgutil.walk_packages(mfd_fast.__path__, "mfd_fast.")
    names = [m.name for m in found if not m.name.endswith("_C") and ".kernels.triton." not in m.name]
    # The adapters import their trainer; tests/integrations tries theirs.
    return ["mfd_fast", *(n for n in names if ".integrations." not in n or n.endswith(".shared"))]


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_every_public_function_has_an_example():
    finder = doctest.DocTestFinder(recurse=False)
    for name in mfd_fast.__all__:
        value = getattr(mfd_fast, name)
        if callable(value) and not isinstance(value, type):
            tests = finder.find(value, name, globs={})
            assert any(t.examples for t in tests), name
        assert value.__doc__, name
