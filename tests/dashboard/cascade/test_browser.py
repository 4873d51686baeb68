"""The cascade page in a real browser: select, click, share, follow a live training."""

import json
import re
import shutil
import time

import pytest

from geodiag.events import Event
from tests.dashboard import synthetic
from tests.dashboard.browser import chart, drag, layout, until

pytestmark = pytest.mark.browser
WHERE = "(document.getElementById('cascade-where')?.innerText ?? '')"


def cell_box(page, stage: int, layer: int, step: float) -> tuple[float, float]:
    """Where a cell of a stage's map is on the screen."""
    chart(page, "cascade-picture")
    frame = page.locator("#cascade-picture .js-plotly-plot").bounding_box()
    full = "document.querySelector('#cascade-picture .js-plotly-plot')._fullLayout"
    x, y = page.evaluate(
        f"[{full}.xaxis._offset + {full}.xaxis.l2p({step}), "
        f"{full}.yaxis{stage + 1}._offset + {full}.yaxis{stage + 1}.l2p({layer})]"
    )
    return frame["x"] + x, frame["y"] + y


def test_the_verdict_the_picture_and_all_four_cards_are_there_at_once(page):
    page.goto(f"{page.home}run/mhc-tear/cascade")
    page.get_by_role("heading", name="Spike at step 360").wait_for()
    for name in (
        "cascade-picture",
        "cascade-series",
        "cascade-experts",
        "cascade-maps",
        "cascade-tokens",
    ):
        chart(page, name)
    assert "SwiGLU clamping" in page.locator(".facts").inner_text()
    assert "layer 3 · local curvature" in page.locator("#cascade-where").inner_text()
    assert page.locator("#cascade-evidence .ag-row").count() >= 4
    ranges = [
        layout(page, name, "xaxis.range")
        for name in ("cascade-picture", "cascade-series", "cascade-experts")
    ]
    assert ranges[0] == ranges[1]
    assert page.url.endswith("/run/mhc-tear/cascade")  # nothing was chosen by opening it


def test_a_click_on_a_cell_shows_it_and_its_address_can_be_shared(page):
    page.goto(f"{page.home}run/mhc-tear/cascade")
    chart(page, "cascade-series")
    title = "document.querySelector('#cascade-series .js-plotly-plot').layout.annotations[0].text"
    before = page.evaluate(title)
    page.mouse.click(*cell_box(page, 2, 4, 366))
    page.wait_for_url(re.compile("layer=4"))
    assert "stage=2" in page.url
    step = int(re.search(r"[?&]step=(\d+)", page.url)[1])
    assert abs(step - 366) <= 1
    until(page, f"{WHERE}.includes('layer 4 · routing instability · step {step}')")
    shared = page.url
    until(page, f"{title} !== {json.dumps(before)}")
    shown = page.evaluate(title)
    page.goto(f"{page.home}run/mhc-tear/gain")
    page.goto(shared)
    until(page, f"{WHERE}.includes('layer 4 · routing instability · step {step}')")
    chart(page, "cascade-series")
    until(page, f"{title} === {json.dumps(shown)}")


def test_a_row_of_the_evidence_shows_its_cell(page):
    page.goto(f"{page.home}run/mhc-tear/cascade?spike=360&stage=3&layer=5&step=370")
    until(page, f"{WHERE}.includes('layer 5')")
    page.locator("#cascade-evidence .ag-row").first.locator(".ag-cell").nth(2).click()
    until(page, f"{WHERE}.includes('layer 3 · local curvature')")
    assert "spike=360" in page.url


def test_the_overview_leads_to_the_cascade_and_from_one_to_the_next(page):
    page.goto(f"{page.home}run/mhc-tear/overview")
    page.locator(".event", has_text="loss left its trend").click()
    page.wait_for_url("**/run/mhc-tear/cascade?spike=360")
    page.get_by_role("heading", name="Spike at step 360").wait_for()
    page.get_by_role("link", name="early warning 351").click()
    page.wait_for_url("**/run/mhc-tear/cascade?spike=351")
    page.get_by_role("heading", name="Early warning at step 351").wait_for()
    until(page, "document.querySelector('.choice.here')?.innerText === 'early warning 351'")
    assert page.locator(".choice.here").count() == 1


def test_an_alternative_leads_to_its_own_cell(page):
    page.goto(f"{page.home}run/mhc-tear/cascade?spike=360")
    page.locator(".others summary").click()
    link = page.locator(".others a").first
    layer = re.search(r"layer=(\d+)", link.get_attribute("href"))[1]
    link.click()
    until(page, f"{WHERE}.includes('layer {layer} ·')")


def test_a_drag_picks_a_window_in_a_run_without_a_spike(page):
    page.goto(f"{page.home}run/hc-growing/cascade")
    page.get_by_role("heading", name="No spike so far").wait_for()
    chart(page, "cascade-picture")
    until(
        page, "location.search.includes('steps=')", lambda: drag(page, "cascade-picture", 0.2, 0.6)
    )
    low, high = map(int, re.search(r"steps=(\d+)-(\d+)", page.url).groups())
    until(
        page,
        "document.querySelector('#cascade-picture .js-plotly-plot')"
        f"._fullLayout.xaxis.range[0] === {low} - 0.5",
    )
    assert low < high
    page.get_by_role("link", name="most unusual step").click()
    page.wait_for_url(re.compile("spike="))
    page.locator(".choice.here").wait_for()


def test_the_page_shows_a_spike_of_a_live_training_when_it_is_detected(page, runs):
    script = synthetic.RunScript(
        steps=400, layers=3, seed=6, spikes=(synthetic.ScriptedSpike(onset=300, layer=1, expert=2),)
    )
    run = synthetic.create(runs / "growing", script)
    try:
        synthetic.write_rows(run, script, 0, 280)
        run.heartbeat(279)
        page.goto(f"{page.home}run/growing/cascade")
        page.get_by_role("heading", name="No spike so far").wait_for()
        chart(page, "cascade-picture")
        synthetic.write_rows(run, script, 280, 304)
        for event in script.events():
            if event.kind == "spike":
                run.event(event)
        page.get_by_role("heading", name="Spike at step 300").wait_for()
        until(page, f"{WHERE}.includes('layer 1 · local curvature')")
        run.event(Event(step=304, kind="rollback", message="back to step 290", time=time.time()))
        page.locator("#legend", has_text="rollback").wait_for()
        assert page.url.endswith("/run/growing/cascade")
    finally:
        run.close()
        page.goto(page.home)
        shutil.rmtree(runs / "growing")  # the other tests count the runs


def test_the_view_fits_a_narrow_window(page):
    page.set_viewport_size({"width": 1000, "height": 800})
    page.goto(f"{page.home}run/mhc-tear/cascade")
    chart(page, "cascade-tokens")
    page.wait_for_timeout(600)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for name in ("cascade-picture", "cascade-maps"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] + box["width"] <= 1000
