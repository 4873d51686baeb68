"""Benchmark of the dashboard on a long run: from the click to the last chart, in a real browser.

    geodiag bench dashboard [--steps 20000] [--layers 32] [--experts 16] [--times 3] [--run DIR]

`geodiag dashboard` serves a run of made-up rows in real files, in a process of its own. Each page
is opened by a server that has read nothing yet, then once more, then zoomed in. At last the run
grows by a step at a time while its page is open. Times end when every chart is drawn. Results:
benchmarks/results/dashboard.json and dashboard.md. Needs Chromium, on the PATH or named by
$CHROMIUM.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from geodiag.benchmarks.cascade_speed import add_size, long_run
from geodiag.benchmarks.report import Parser, save, say, setting, where
from geodiag.errors import GeodiagError
from geodiag.run import Run

PAGES = ("overview", "cascade", "gain", "routing", "activations", "events")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
_DRAWN = """(() => {
  const charts = [...document.querySelectorAll('.chart .js-plotly-plot')];
  const hasAxis = (p) => p.layout && p.layout.xaxis?.visible !== false;
  const full = (p) => hasAxis(p) || p.layout?.annotations?.length;
  return document.querySelectorAll('.card').length > 0
    && charts.length === document.querySelectorAll('.chart').length
    && charts.every(full);
})()"""
_PATIENCE = 120.0
_AFTER_MS = 300


class Server:
    """`geodiag dashboard` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [
            sys.executable,
            "-u",
            "-m",
            "geodiag.cli",
            "dashboard",
            str(folder),
            "--port",
            "0",
            "--no-open",
        ]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"http://\S+token=\S+", line):
                self.url = found[0]
                return
        raise GeodiagError("geodiag dashboard did not start; run it by hand to see why")

    def cpu_seconds(self) -> float:
        """Return the processor time of the server so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


class Reader:
    """A browser page of the server."""

    def __init__(self, browser: Any, server: Server) -> None:
        self._tab = browser.new_page(viewport={"width": 1440, "height": 900})
        self._server = server
        self._answered: list[Any] = []
        self._tab.on("requestfinished", lambda request: self._answered.append(request))
        self._tab.goto(server.url)
        self._tab.wait_for_load_state("networkidle")
        self._home = self._tab.url.split("/run/")[0].rstrip("/")

    def opens(self, path: str) -> dict[str, float]:
        """Open a page; return seconds to the last chart, server seconds, and bytes received."""
        self._answered.clear()
        cpu = self._server.cpu_seconds()
        began = time.perf_counter()
        self._tab.goto(f"{self._home}{path}")
        self._until(_DRAWN)
        seconds = time.perf_counter() - began
        self._tab.wait_for_load_state("networkidle")
        # The end of the last response is reported a little after its chart is drawn.
        self._tab.wait_for_timeout(_AFTER_MS)
        figures = [r for r in self._answered if "_dash-update-component" in r.url]
        size = sum(r.sizes()["responseBodySize"] for r in figures)
        return {"seconds": seconds, "cpu_seconds": self._server.cpu_seconds() - cpu, "bytes": size}

    def sees_step(self, step: int) -> float:
        """Return the seconds until the page shows that the run has reached `step`."""
        began = time.perf_counter()
        self._until(f"document.querySelector('.standing-step')?.innerText === 'step {step:,}'")
        return time.perf_counter() - began

    def close(self) -> None:
        self._tab.close()

    def _until(self, expression: str) -> None:
        end = time.monotonic() + _PATIENCE
        while not self._tab.evaluate(expression):
            if time.monotonic() > end:
                raise GeodiagError(
                    f"the page did not get there within {_PATIENCE:.0f} s: {expression}"
                )
            self._tab.wait_for_timeout(10)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser. GeodiagError if there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise GeodiagError(
            "the bench drives a browser by playwright; pip install playwright"
        ) from None
    path = os.environ.get("CHROMIUM") or next((p for n in CHROMIUM if (p := shutil.which(n))), None)
    if path is None:
        raise GeodiagError("no Chromium found; install it, or set $CHROMIUM to its path")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def measure(run: Path, steps: int, times: int) -> dict[str, Any]:
    """Return the medians by page and by the way it was opened."""
    found: dict[str, Any] = {}
    with chromium() as browser:
        for page in PAGES:
            path = f"/run/{run.name}/{page}"
            window = f"?steps={steps // 2 - 150}-{steps // 2 + 150}"
            ways: dict[str, list] = {"first": [], "again": [], "zoomed": []}
            for _ in range(times):
                server = Server(run.parent)
                try:
                    reader = Reader(browser, server)
                    for way, query in (("first", ""), ("again", ""), ("zoomed", window)):
                        ways[way].append(reader.opens(path + query))
                    reader.close()
                finally:
                    server.stop()
            found[page] = {
                way: {k: statistics.median(r[k] for r in rows) for k in rows[0]}
                for way, rows in ways.items()
            }
    return found


def follow(run: Path, steps: int, times: int) -> dict[str, float]:
    """Return the delay from a step on disk to the page that shows it, and the server's time for it.

    The delay includes the page's polling interval.
    """
    seconds = []
    cpu = []
    with chromium() as browser:
        server = Server(run.parent)
        growing = Run.create(run)
        try:
            growing.heartbeat(steps)
            reader = Reader(browser, server)
            reader.opens(f"/run/{run.name}/overview")
            for step in range(steps, steps + times):
                before = server.cpu_seconds()
                growing.append("steps", {"step": np.array([step]), "loss": np.array([2.0])})
                growing.heartbeat(step)
                seconds.append(reader.sees_step(step))
                cpu.append(server.cpu_seconds() - before)
            reader.close()
        finally:
            growing.close()
            server.stop()
    return {"seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu)}


def page(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    asked = result["settings"]
    live = result["live"]
    lines = [
        "# How fast the page is",
        "",
        f"{asked['steps']:,} steps of {asked['layers']} layers and {asked['experts']} experts, "
        f"{result['run_bytes'] / 1e6:,.0f} MB; medians of {asked['times']}. Seconds from the "
        "click to the last chart,",
        "in brackets what the server computed for it; kB are the answers as they travel.",
        "",
        "| page | first open | again | zoomed in | first, kB |",
        "|---|---|---|---|---|",
    ]
    for name, ways in result["pages"].items():
        cells = [
            f"{ways[w]['seconds']:.2f} ({ways[w]['cpu_seconds']:.2f})"
            for w in ("first", "again", "zoomed")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {ways['first']['bytes'] / 1e3:,.0f} |")
    lines += [
        "",
        f"A new step of a living run is on the page {live['seconds']:.1f} s after it is on disk "
        "(it looks every 1.5 s)",
        f"and costs the server {live['cpu_seconds']:.2f} s.",
        "",
        where(result),
        "",
        f"    {result['command']}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("dashboard", __doc__)
    add_size(parser, steps=20_000, experts=16)
    options = parser.parse_args(argv)
    with long_run(options) as (home, settings):
        result = setting("dashboard", argv) | settings
        result["pages"] = measure(home, options.steps, options.times)
        with tempfile.TemporaryDirectory() as place:  # the run that was measured stays as it is
            growing = Path(place) / home.name
            shutil.copytree(home, growing)
            result["live"] = follow(growing, options.steps, 5)
    save("dashboard", result, page(result), options.out)
    say(result, page(result), options.json)


if __name__ == "__main__":
    main()
