"""What the tree promises about itself: file sizes, layers, doctests."""

import ast
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
    assert all("bindings" in p.parent.relative_to(ROOT).parts for p in users)


def imports(tree):
    """Module -> the modules of the package that it imports, wherever in it."""
    paths = {p.relative_to(tree.parent).with_suffix("").parts: p for p in tree.rglob("*.py")}
    files = {".".join(parts[:-1] if parts[-1] == "__init__" else parts): p for parts, p in paths.items()}
    found = {}
    for module, path in files.items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                outer = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*outer, *filter(None, [node.module])])
                wanted |= {n if (n := f"{base}.{alias.name}") in files else base for alias in node.names}
        found[module] = wanted & files.keys() - {module}
    return found


def circles(graph):
    """What is left when every module without imports among the left ones is taken away, again and again."""
    left = dict(graph)
    while free := [module for module, wanted in left.items() if not wanted & left.keys()]:
        for module in free:
            del left[module]
    return left


def test_no_modules_import_each_other(tmp_path):
    """Nor inside functions: what needs that has its layers wrong."""
    graph = imports(ROOT / "mfd_fast")
    assert len(graph) > 50
    assert circles(graph) == {}
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "__init__.py").write_text("")
    (tree / "one.py").write_text("from .other import x\n")
    (tree / "other.py").write_text("def f():\n    from . import one\n")
    assert set(circles(imports(tree))) == {"tree.one", "tree.other"}


def modules():
    found = pkgutil.walk_packages(mfd_fast.__path__, "mfd_fast.")
    names = [m.name for m in found if not m.name.endswith("_C") and ".kernels.triton." not in m.name]
    # The other adapters import their trainer; tests/integrations tries theirs.
    alone = (".shared", ".fusion", ".layers")
    return ["mfd_fast", *(n for n in names if ".integrations." not in n or n.endswith(alone))]


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
