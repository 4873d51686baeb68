"""Reports and comparisons in a real browser without a network."""

import time
from pathlib import Path
from typing import Any

import pytest

from geodiag.dashboard.reports.comparison import compare
from geodiag.dashboard.reports.comparison_page import page as compare_page
from geodiag.dashboard.reports.report_page import report
from geodiag.run import open_run
from tests.dashboard import synthetic
from tests.dashboard.run_script import RunScript, ScriptedSpike

pytestmark = pytest.mark.browser

NAME = "<img src=x onerror=alert(1)>"
SHORT = RunScript(steps=120, seed=7, spikes=(ScriptedSpike(onset=80, layer=2, expert=1),))


@pytest.fixture(scope="module")
def files(runs, tmp_path_factory) -> dict[str, Path]:
    """One page of each kind; one of the runs has a name that tries something."""
    folder = tmp_path_factory.mktemp("files")
    synthetic.write(folder / NAME, SHORT)
    named = open_run(folder / NAME)
    compared = compare([open_run(runs / "mhc-tear"), named, open_run(runs / "plain")])
    pages = {
        "report": report(open_run(runs / "mhc-tear")).html(time.time()),
        "named": report(named).html(time.time()),
        "empty": report(open_run(runs / "empty")).html(time.time()),
        "compare": compare_page(compared, time.time()),
    }
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture
def opened(chromium, files):
    """`opened("report", width=420)`: the page in a tab without a network; at the end, nothing may
    have gone wrong.
    """
    contexts, wrong = [], []

    def open_page(name: str, width: int = 1300, scheme: str = "light") -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on(
            "console",
            lambda m: (
                wrong.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None
            ),
        )
        tab.on("pageerror", lambda e: wrong.append(f"exception: {e}"))
        tab.on("dialog", lambda d: (wrong.append(f"dialog: {d.message}"), d.dismiss()))
        tab.on(
            "request",
            lambda r: (
                None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url)
            ),
        )
        tab.goto(files[name].as_uri())
        tab.wait_for_selector("html[data-drawn]", timeout=20_000)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def drawn(tab: Any) -> list[dict[str, Any]]:
    """Every chart: its name, how many of its traces are on the page, and the text in
    place of a chart.
    """
    return tab.evaluate(
        """() => [...document.querySelectorAll(".chart")].map((e) => ({
             name: e.getAttribute("aria-label"),
             traces: e.querySelectorAll(".scatterlayer .trace, .heatmaplayer .hm").length,
             text: e.querySelector(".annotation-text")?.textContent ?? "",
             axis: e.layout.xaxis?.range,
           }))"""
    )


def until(tab: Any, expression: str) -> None:
    """Waits until it is true. Playwright's own way of waiting is a script that the page's policy
    refuses.
    """
    for _ in range(100):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


@pytest.mark.parametrize("name", ["report", "named", "compare", "empty"])
def test_every_chart_is_drawn_or_replaced_by_a_reason(opened, name) -> None:
    charts = drawn(opened(name))
    assert len(charts) >= {"report": 9, "named": 9, "compare": 3, "empty": 5}[name]
    assert all(c["traces"] or c["text"] for c in charts)
    if name != "empty":
        assert all(c["traces"] for c in charts), [c for c in charts if not c["traces"]]


def test_a_report_reads_from_the_verdict_down(opened) -> None:
    tab = opened("report")
    assert tab.inner_text("h1") == "mhc-tear"
    assert tab.inner_text(".lead") == "Spike at step 360: an expert outlier"
    assert "layer 3, ffn, expert 5" in tab.inner_text("#spike-360 .facts")
    tab.click("text=Gain >> nth=0")
    until(tab, "location.hash === '#gain'")
    tab.hover("#loss .bubble")
    shown = tab.evaluate(
        "getComputedStyle(document.querySelector('#loss .bubble'), '::after').content"
    )
    assert "Training loss of the step." in shown


def test_a_zoom_moves_every_chart_of_the_run_and_a_double_click_all_of_them_back(opened) -> None:
    tab = opened("report")
    before = [c["axis"] for c in drawn(tab)]
    tab.evaluate("Plotly.relayout('chart-0', {'xaxis.range[0]': 100, 'xaxis.range[1]': 200})")
    together = [i for i, axis in enumerate(before) if axis == before[0]]
    assert len(together) >= 4
    moved = (
        f"[{together}].flat().every((i) => "
        "document.getElementById('chart-' + i).layout.xaxis.range[1] === 200)"
    )
    until(tab, moved)
    assert drawn(tab)[1]["axis"] == before[1], "the cascade has steps of its own"
    tab.evaluate("Plotly.relayout('chart-0', {'xaxis.autorange': true})")
    until(tab, f"document.getElementById('chart-{together[-1]}').layout.xaxis.range[1] > 500")
    assert [c["axis"] for c in drawn(tab)] == before


@pytest.mark.parametrize("name", ["report", "compare"])
def test_light_and_dark_follow_the_system_and_paper_is_light(opened, name) -> None:
    tab = opened(name, scheme="dark")
    ink = "document.querySelector('#chart-0 .xtick text').style.fill"
    assert tab.evaluate(ink) == "rgb(152, 162, 179)"
    tab.emulate_media(color_scheme="light")
    until(tab, f"{ink} === 'rgb(102, 112, 133)'")
    tab.emulate_media(color_scheme="dark")
    until(tab, f"{ink} === 'rgb(152, 162, 179)'")
    tab.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {ink} }})")
    assert len(tab.pdf(format="A4")) > 50_000
    assert tab.evaluate("window.printed") == "rgb(102, 112, 133)"
    until(tab, f"{ink} === 'rgb(152, 162, 179)'")


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("width", [420, 1000])
def test_nothing_is_wider_than_a_narrow_window(opened, name, width) -> None:
    tab = opened(name, width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_a_folder_name_with_markup_is_shown_as_text_in_charts_too(opened) -> None:
    tab = opened("compare")
    assert NAME in tab.evaluate(
        "[...document.querySelectorAll('.legendtext')].map((e) => e.textContent)"
    )
    assert NAME in tab.inner_text("#runs")
    assert "✓" in tab.inner_text("#metrics")
