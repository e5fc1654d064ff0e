"""A type has one definition, so that a name is one thing, in Python, Triton and C++."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")


def sources(*trees: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    return [path for tree in trees for path in sorted((ROOT / tree).rglob("*")) if path.suffix in suffixes]


SOURCES = sources("csrc", "kernels/cuda")
#: What a program for one kind of device is made of.
HOST = sources("csrc/bindings", "csrc/common", "csrc/cpu")
CUDA = sources("csrc/bindings", "csrc/common", "csrc/cuda", "kernels/cuda")
PYTHON = sources("mfd_fast", suffixes=(".py",))
TRITON = sources("kernels/triton", suffixes=(".py",))
#: One thing, written once for the CPU and once for CUDA.
TWINS = {"F32", "F64", "View", "LogSumExp", "BackwardRow", "TopKRow"}
#: One thing, written once in each of several languages.
MIRRORS = {
    # what a checked call is, and what crosses the border to native code
    *("RowProblem", "PoolProblem", "Tap", "TopK", "Scalar", "RowMatrix", "RowScalar", "ScalarLoss", "Places", "Plans"),
    # the divergences, and what a row has of them
    *(
        "Divergence",
        "AlphaBeta",
        "CrossEntropy",
        "ForwardKL",
        "JSD",
        "ReverseKL",
        "SkewKL",
        "SkewReverseKL",
        "TVD",
        "Point",
        "Slopes",
    ),
    *("TopKSlopes", "Side", "TopKRow", "Listed", "RowTerms"),
    # the gradients of a call: tensors, addresses, or what computes them
    *("RowGradients", "PoolGradients"),
}
#: Public names of an adapter that are the other library's own.
DROP_IN = {"LogitsDistillationLoss"}
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


def python_definitions(files: list[Path]) -> dict[str, list[str]]:
    """Where each class and alias of a type is defined at the top of a module; names with _ are its own."""
    found = defaultdict(list)
    for path in files:
        pending = list(ast.parse(path.read_text(encoding="utf-8")).body)
        while pending:
            node = pending.pop(0)
            if isinstance(node, (ast.If, ast.Try)):
                pending += [*node.body, *node.orelse]
            name = None
            if isinstance(node, ast.ClassDef):
                name = node.name
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                name = target.id if isinstance(target, ast.Name) and not target.id.isupper() else None
            if name and name[0].isupper():
                found[name].append(path.name)
    return found


def twice(found: dict[str, list[str]]) -> set[str]:
    return {name for name, places in found.items() if len(places) > 1}


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
        assert twice(definitions(tree)) <= NESTED
    assert twice(found) - NESTED == TWINS
    for name in ("one.h", "other.h"):
        (tmp_path / name).write_text("template <class S>\nstruct Layout {\n  int size;\n};\n")
    assert definitions(sorted(tmp_path.iterdir()))["Layout"] == ["one.h", "other.h"]


def test_no_type_of_python_or_triton_is_defined_twice(tmp_path):
    python, triton = python_definitions(PYTHON), python_definitions(TRITON)
    assert {"DistillProblem", "DistillTerms", "RowNeeds", "Choice", "Step", "ModalPool"} < python.keys()
    assert {"RowProblem", "Logits", "How", "TopKRow", "Features"} < triton.keys()
    assert twice(python) == DROP_IN
    assert twice(triton) == set()
    (tmp_path / "one.py").write_text("class Layout:\n    size: int\n\n\nSIZE = 3\n_Own = int\n")
    (tmp_path / "two.py").write_text("if True:\n    Layout = tuple[int, int]\nLayout: type = int\n")
    assert python_definitions(sorted(tmp_path.iterdir())) == {"Layout": ["one.py", "two.py", "two.py"]}


def test_a_name_is_one_thing_in_every_language():
    languages = [set(python_definitions(PYTHON)), set(python_definitions(TRITON)), set(definitions(SOURCES))]
    names = set.union(*languages)
    assert {name for name in names if sum(name in found for found in languages) > 1} == MIRRORS


def test_the_vocabulary_names_what_the_sources_define():
    """Types that the vocabulary lists are there, under that name."""
    listed = set(re.findall(r"`([A-Z][a-z]\w+)`", (ROOT / "docs" / "vocabulary.md").read_text()))
    assert {"RowProblem", "PoolProblem", "RowMatrix", "RowScalar", "Side", "Tap", "Point", "View"} <= listed
    assert listed <= definitions(SOURCES).keys() | python_definitions(PYTHON).keys() | python_definitions(TRITON).keys()
