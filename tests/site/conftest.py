"""The site is read in a browser where `make docs` has built it and names one. Elsewhere there is nothing to collect."""

import contextlib
import functools
import http.server
import os
import threading

import pytest

SITE, BROWSER = (os.environ.get(f"MFD_FAST_{name}") for name in ("SITE", "BROWSER"))
collect_ignore_glob = [] if SITE and BROWSER else ["test_*.py"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site():
    """Address of the built pages, served on this machine."""
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with (
        sync_playwright() as tools,
        contextlib.closing(
            tools.chromium.launch(executable_path=BROWSER, args=[*quiet, "--disable-sync", "--no-first-run"])
        ) as browser,
    ):
        yield browser


@pytest.fixture
def open_page(browser, site):
    """open_page(path, width) -> a page; at the end of the test no console has an error"""
    trouble = []

    def opened(path, width=1280):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(300_000)  # ms: a busy machine is no error of the pages
        page.on("console", lambda message: message.type == "error" and trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("response", lambda answer: answer.status >= 400 and trouble.append(f"{answer.url}: {answer.status}"))
        page.goto(f"{site}/{path}")
        return page

    yield opened
    assert trouble == []
