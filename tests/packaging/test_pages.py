"""What the pages name is there: tests, files, options of the commands; and no page is left out of the site."""

import re
from pathlib import Path

import pytest

from mfd_fast.backends import environment

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
FILE = re.compile(r"`((?:\.ci|benchmarks|csrc|docs|examples|kernels|mfd_fast|tests)/[\w./-]*\w/?)`")


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_a_page_names_are_there(page):
    missing = [name for name in FILE.findall(PAGES[page]) if not (ROOT / name).exists()]
    names = re.findall(r"`(_?test_\w+|_inputs_are_never_written)`", PAGES[page])
    missing += [name for name in names if not re.search(rf"\bdef {name}\b", TESTS)]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_a_page_outside_the_site_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", PAGES[page])
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_is_short():
    assert PAGES["README.md"].count("\n") <= 120


def test_every_promise_and_special_value_has_a_test():
    rows = re.findall(r"^\| (?!case|promise|dtype|-)(.+) \|$", PAGES["docs/numerics.md"], re.MULTILINE)
    without = [row for row in rows if "`test_" not in row and "_never_written" not in row]
    assert len(rows) > 35
    assert [row.split("|")[0].strip() for row in without] == ["float16, bfloat16", "float32", "float64"]


def test_the_variables_of_a_run_are_listed():
    listed = set(re.findall(r"^\| `(MFD_FAST_\w+)` \|", PAGES["docs/building.md"], re.MULTILINE))
    assert listed == {variable.name for variable in environment.VARIABLES}


def test_makefile_targets_that_a_page_names_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for page, text in PAGES.items():
        for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE) + re.findall(r"`make ([a-z-]+)[` ]", text):
            assert re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_the_site_leads_to_every_page():
    listed = set()
    for page in ("docs/index.md", "docs/api/index.md"):
        for tree in re.findall(r"```\{toctree\}(.*?)```", PAGES[page], re.DOTALL):
            names = re.findall(r"^(?:.*<)?([\w/]+)>?$", tree, re.MULTILINE)
            listed |= {f"{page.rpartition('/')[0]}/{name}.md" for name in names}
    assert listed | {"docs/index.md"} == {page for page in PAGES if page.startswith("docs/")}
