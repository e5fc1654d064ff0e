"""The Python blocks of the README and of docs/ run as written, and the README's op table names every public op."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import mfd_fast as mfd

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = [
    (page.name, block)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize(("page", "block"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_examples_run(page, block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may save a file
    exec(compile(block, page, "exec"), {})
    assert capsys.readouterr().out


def test_pages_with_examples():
    assert {"README.md", "index.md", "start.md", "fusion.md"} <= {page for page, _ in EXAMPLES}


def test_op_table_is_complete():
    table = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    ops = {n for n in mfd.__all__ if inspect.isfunction(getattr(mfd, n))} - {"explain", "use_backend"}
    assert table == ops
