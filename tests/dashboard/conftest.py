"""Fixtures: synthetic runs, one server for all browser tests, one Chromium."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.dashboard import synthetic

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of finished runs: one with a tear, one whose gain grows, one without
    hyper-connections.
    """
    folder = tmp_path_factory.mktemp("runs")
    synthetic.write(folder / "mhc-tear", synthetic.MHC)
    synthetic.write(folder / "hc-growing", synthetic.HC)
    synthetic.write(folder / "plain", synthetic.PLAIN)
    synthetic.create(folder / "empty", synthetic.MHC).close()
    return folder


@pytest.fixture(scope="session")
def served(runs):
    """The folder of runs, served."""
    from geodiag.dashboard.serve import DashboardServer

    page = DashboardServer(runs, "127.0.0.1", 0, None)
    thread = threading.Thread(target=page.run, daemon=True)
    thread.start()
    yield page
    page.stop()
    thread.join(5)


@pytest.fixture(scope="session")
def chromium():
    """The system's Chromium, driven by Playwright."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium: install it, or set $CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, served):
    """A new tab with the token. Fails on console errors and on requests to other hosts."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    tab = context.new_page()
    wrong: list[str] = []
    tab.on(
        "console",
        lambda m: wrong.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None,
    )
    tab.on("pageerror", lambda e: wrong.append(f"exception: {e}"))
    home = f"http://127.0.0.1:{served.port}/"
    tab.on(
        "request",
        lambda r: wrong.append(f"elsewhere: {r.url}") if _elsewhere(r.url, home) else None,
    )
    tab.goto(served.url)
    tab.home = home
    yield tab
    context.close()
    assert wrong == []


def _elsewhere(url: str, home: str) -> bool:
    return not url.startswith((home, "data:", "blob:"))
