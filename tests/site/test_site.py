"""The built pages, read as a person reads them: navigation, search, a phone's width."""

import importlib
import os
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md"))
PHONE, DESKTOP = 390, 1280


def test_the_navigation_leads_to_every_page(open_page, site):
    page = open_page("index.html")
    names = page.locator(".sidebar-tree a.reference.internal").evaluate_all("links => links.map(a => a.href)")
    found = {name.split("#")[0].split("/", 3)[3] for name in names}
    assert found | {"index.html"} == set(PAGES)
    for name in sorted(found):
        page.goto(f"{site}/index.html")
        page.locator(f".sidebar-tree a[href='{name}']").first.evaluate("link => link.click()")
        page.wait_for_url(f"**/{name}")
        assert page.locator("article h1").inner_text().strip()


@pytest.mark.parametrize("word", ["temperature", "distill_loss", "ModalityDropout"])
def test_the_search_finds(open_page, word):
    page = open_page("index.html")
    page.locator("input.sidebar-search").fill(word)
    page.locator("input.sidebar-search").press("Enter")
    page.wait_for_url("**/search.html?*")
    page.wait_for_selector("#search-results li a")
    found = page.locator("#search-results li a").evaluate_all("links => links.map(a => a.href)")
    assert any("/api/" in href for href in found)
    page.locator("#search-results li a").first.click()
    page.wait_for_selector("article h1")
    assert word.lower() in page.locator("article").inner_text().lower()


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_pages_fit_their_window(open_page, site, width):
    """Tables and code scroll by themselves, the page does not; pictures are there; links lead somewhere."""
    page = open_page("index.html", width)
    for name in PAGES:
        page.goto(f"{site}/{name}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.locator("img").evaluate_all("images => images.every(i => i.complete && i.naturalWidth > 0)"), name
        anchors = page.locator("article a[href^='#']").evaluate_all("links => links.map(a => a.hash.slice(1))")
        missing = "names => names.filter(name => name && !document.getElementById(decodeURIComponent(name)))"
        assert page.evaluate(missing, anchors) == [], name


def test_the_reference_has_every_public_name():
    from sphinx.util.inventory import InventoryFile

    with open(Path(os.environ["MFD_FAST_SITE"]) / "objects.inv", "rb") as file:
        known = InventoryFile.load(file, "", lambda base, name: name)
    documented = {name for kind, names in known.items() if kind.startswith("py:") for name in names}
    last = {name.rpartition(".")[2] for name in documented}
    for module in ("mfd_fast", *(f"mfd_fast.{name}" for name in ("nn", "schedules", "balance", "presets", "testing"))):
        assert set(importlib.import_module(module).__all__) <= last | {module.rpartition(".")[2]}, module
