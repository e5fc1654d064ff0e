"""The README's Python blocks run as written, and its op table names every public op."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import mfd_fast as mfd

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_op_table_is_complete():
    table = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    ops = {n for n in mfd.__all__ if inspect.isfunction(getattr(mfd, n))} - {"explain", "use_backend"}
    assert table == ops
