"""docs/adding_an_op.md: the files it walks through, and that every public op is in each place that it names."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from op_db import RECORDS

import mfd_fast as mfd
from mfd_fast import backends
from mfd_fast.backends.protocol import OPS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_an_op.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "<br>" in line
]
#: Where a line or a few go.
LINES = re.findall(r"`([\w./]+)`", PAGE[PAGE.index("## Where a line") : PAGE.index("## 9 to 11")])
BORDERS = {op.kernels: op.border for op in OPS.values()}


def test_the_steps_name_files_that_have_the_op():
    files = [row[1].split("`")[1] for row in ROWS]
    assert len(files) == 17
    assert len(LINES) == 16
    assert len({*files, *LINES}) == 33
    for name in (*files, *LINES):
        assert re.search("feature|_taps", (ROOT / name).read_text(), re.IGNORECASE), name


def test_every_step_names_a_test():
    assert [row for row in ROWS if "`test_" not in row[2] and row[2] != "the same"] == []


@pytest.mark.parametrize("name", RECORDS)
def test_every_op_is_in_every_place(name):
    op = getattr(mfd, name)
    check = OPS[name].check
    assert (ROOT / "mfd_fast" / "reference" / f"{name.replace('terms', 'loss')}.py").is_file()
    assert op.__module__.rpartition(".")[0] == "mfd_fast.ops"
    assert check.__module__.startswith("mfd_fast.problems.")
    options = set(inspect.signature(op).parameters) - {"backend", "process_group"}
    taken = inspect.signature(check).parameters
    assert options <= set(taken) or any(p.kind is p.VAR_KEYWORD for p in taken.values())
    assert re.search(rf"^\.\. autofunction:: {name}$", (ROOT / "docs/api/ops.md").read_text(), re.MULTILINE)
    assert f"`{name}`" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("backend", backends.NAMES)
@pytest.mark.parametrize("op", BORDERS)
def test_a_backend_has_what_its_protocol_asks_for(op, backend):
    if backend == "reference" and op == "mfd_loss":  # a chain of the other ops
        return
    module = importlib.import_module(f"mfd_fast.backends.{backend}.{op}")
    asked = {name: f for name, f in vars(BORDERS[op]).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert asked
    for name, wanted in asked.items():
        given = getattr(module, name, None)
        if given is None:
            assert backend == "reference", f"{module.__name__} lacks {name}"
            continue
        positional = len(inspect.signature(wanted).parameters) - 1
        needed = [p for p in inspect.signature(given).parameters.values() if p.default is p.empty]
        assert len(needed) <= positional <= len(inspect.signature(given).parameters), f"{module.__name__}.{name}"


def test_ops_that_share_kernels_share_their_border():
    assert {(op.kernels, op.border, op.backends) for op in OPS.values()} == {
        (name, BORDERS[name], backends.KERNELS[name]) for name in BORDERS
    }
    assert RECORDS.keys() == OPS.keys()
