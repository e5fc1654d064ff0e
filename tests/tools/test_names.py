"""A name of a test says which test it is: in the report of a failure, and to `-k`."""

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(TESTS.rglob("*.py"))


def functions(path: Path) -> list[str]:
    return [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def places(files: list[Path]) -> dict[str, list[str]]:
    """Where each test function is defined."""
    found = defaultdict(list)
    for path in files:
        for name in functions(path):
            if name.startswith("test_"):
                found[name].append(path.name)
    return found


def test_no_two_tests_share_a_name(tmp_path: Path) -> None:
    found = places(FILES)
    assert len(found) > 200
    assert {name: where for name, where in found.items() if len(where) > 1} == {}
    for name in ("test_one.py", "test_other.py"):
        (tmp_path / name).write_text("def test_the_same(): ...\n")
    assert places(sorted(tmp_path.iterdir()))["test_the_same"] == ["test_one.py", "test_other.py"]


def test_no_two_files_share_a_name() -> None:
    """Files are imported by their bare names."""
    names = [path.name for path in FILES if path.name not in ("conftest.py", "__init__.py", "__main__.py")]
    assert sorted(names) == sorted(set(names))
