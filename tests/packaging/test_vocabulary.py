"""A type has one definition, so that a name is one thing."""

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")


def sources(*trees: str) -> list[Path]:
    return [path for tree in trees for path in sorted((ROOT / tree).rglob("*")) if path.suffix in SUFFIXES]


SOURCES = sources("csrc", "kernels/cuda")
#: What a program for one kind of device is made of.
HOST = sources("csrc/bindings", "csrc/common", "csrc/cpu")
CUDA = sources("csrc/bindings", "csrc/common", "csrc/cuda", "kernels/cuda")
#: One thing, written once for the CPU and once for CUDA.
TWINS = {"F32", "F64", "View", "LogSumExp", "BackwardRow", "TopKRow"}
TYPE = re.compile(
    r"^\s*(?:template\s*<[^;{]*>\s*)?(?:struct|class|enum class|enum)\s+([A-Z]\w*)\b(?!\s*<)[^;{(]*\{|^using (\w+) =",
    re.MULTILINE,
)
#: Within a type: what each group of threads keeps in shared memory.
NESTED = {"Shared"}


def definitions(files: list[Path]) -> dict[str, list[str]]:
    """Where each type is defined; specialisations of a template do not count."""
    found = defaultdict(list)
    for path in files:
        for match in TYPE.finditer(re.sub(r"//.*", "", path.read_text())):
            found[match[1] or match[2]].append(path.name)
    return found


def test_no_type_is_defined_twice(tmp_path):
    found = definitions(SOURCES)
    assert {
        "RowProblem",
        "PoolProblem",
        "RowMatrix",
        "RowScalar",
        "Divergence",
        "Scratch",
        "ThreadBlock",
    } < found.keys()
    assert len(found) > 120
    for tree in (HOST, CUDA):
        twice = {name: places for name, places in definitions(tree).items() if len(places) > 1}
        assert twice.keys() <= NESTED, twice
    assert {name for name, places in found.items() if len(places) > 1} - NESTED == TWINS
    for name in ("one.h", "other.h"):
        (tmp_path / name).write_text("template <class S>\nstruct Layout {\n  int size;\n};\n")
    assert definitions(sorted(tmp_path.iterdir()))["Layout"] == ["one.h", "other.h"]


def test_the_vocabulary_names_what_the_sources_define():
    """Types of the C++ sources that the vocabulary lists are there, under that name."""
    listed = set(re.findall(r"`([A-Z][a-z]\w+)`", (ROOT / "docs" / "vocabulary.md").read_text()))
    assert {"RowProblem", "PoolProblem", "RowMatrix", "RowScalar", "Side", "Tap", "Point", "View"} <= listed
    assert listed <= definitions(SOURCES).keys()
