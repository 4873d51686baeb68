"""The pages in a real browser. Fixture `page` fails on console errors and foreign requests."""

import json
import re
import time

import numpy as np
import pytest

from geodiag.events import Event
from tests.dashboard import synthetic
from tests.dashboard.browser import chart, layout, plot_area, until, zoom

pytestmark = pytest.mark.browser


def test_the_list_shows_every_run_and_opens_one(page):
    page.locator(".ag-row").first.wait_for()
    text = page.locator("#runs-table").inner_text()
    assert all(name in text for name in ("mhc-tear", "hc-growing", "plain", "empty"))
    assert page.locator(".ag-row svg.spark").count() == 3
    page.get_by_role("link", name="hc-growing").click()
    page.wait_for_url("**/run/hc-growing/overview")
    chart(page, "overview-timeline")
    assert "12.3" in page.locator("#overview-tiles").inner_text()


def test_every_page_opens_in_both_schemes(page):
    for name, shown in (
        ("overview", "overview-timeline"),
        ("cascade", "cascade-picture"),
        ("gain", "gain-heat"),
        ("routing", "routing-flips"),
        ("activations", "activations-heat"),
    ):
        page.goto(f"{page.home}run/mhc-tear/{name}")
        chart(page, shown)
        assert page.locator(f".g-tab.here:has-text('{name.capitalize()}')").count() == 1
    page.locator(".g-tab a", has_text="Events").click()
    page.locator(".ag-row").first.wait_for()
    assert page.locator("html").get_attribute("data-mantine-color-scheme") == "light"
    page.get_by_role("button", name="light or dark").click()
    page.wait_for_selector("html[data-mantine-color-scheme=dark]")
    page.locator(".g-tab a", has_text="Overview").click()
    chart(page, "overview-timeline")
    ink = "data.find(t => t.name === 'loss').line.color"
    assert (
        page.evaluate(f"document.querySelector('#overview-timeline .js-plotly-plot').{ink}")
        == "#e6e9f0"
    )
    page.reload()
    chart(page, "overview-timeline")
    assert page.locator("html").get_attribute("data-mantine-color-scheme") == "dark"


def test_a_drag_zooms_every_page_and_a_double_click_ends_it(page):
    page.goto(f"{page.home}run/mhc-tear/overview")
    low, high = zoom(page, "overview-timeline", 0.5, 0.75)
    assert (low, high) == (pytest.approx(299, abs=8), pytest.approx(449, abs=8))
    page.locator(".g-tab a", has_text="Gain").click()
    chart(page, "gain-heat")
    apply_zoom = "document.querySelector('#gain-heat .js-plotly-plot')?._fullLayout?.xaxis?.range"
    until(page, f"JSON.stringify({apply_zoom}) === '[{low},{high}]'")
    box = plot_area(page, "gain-heat")
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    until(page, "!location.search.includes('steps=')", lambda: page.mouse.dblclick(*middle))
    until(
        page,
        "document.querySelector('#gain-heat .js-plotly-plot')._fullLayout.xaxis.range[1] > 590",
    )


def test_a_click_on_a_cell_moves_profile_and_matrices(page):
    page.goto(f"{page.home}run/mhc-tear/gain")
    box = plot_area(page, "gain-heat")
    cell = box["x"] + box["width"] * 0.5, box["y"] + box["height"] * (3.5 / 12)
    until(page, "location.search.includes('site=1.ffn')", lambda: page.mouse.click(*cell))
    step = int(re.search(r"step=(\d+)", page.url)[1])
    assert step == pytest.approx(300, abs=5)
    until(page, f"document.getElementById('gain-where').innerText === 'step {step}'")
    page.get_by_text(f"1.ffn, sampled at step {step // 50 * 50}").wait_for()
    page.locator("#gain-site-choice").click()
    page.get_by_role("option", name="4.attn").click()
    page.get_by_text("4.attn, sampled at step").wait_for()
    page.go_back()
    page.get_by_text("1.ffn, sampled at step").wait_for()
    until(page, "document.getElementById('gain-site-choice').value === '1.ffn'")
    page.go_back()
    until(page, "document.getElementById('gain-where').innerText === 'step 599, the newest'")


def test_switching_quantity_and_layer_changes_the_charts_and_the_address(page):
    page.goto(f"{page.home}run/mhc-tear/gain?metric=single&over=max")
    chart(page, "gain-heat")
    assert page.locator("#gain-metric").input_value() == "single-site gain"
    page.locator("#gain-metric").click()
    page.get_by_role("option", name="Sinkhorn residual").click()
    page.wait_for_url(re.compile("metric=sinkhorn"))
    until(
        page,
        "document.querySelector('#gain-heat .js-plotly-plot')"
        ".layout.annotations[0].text.includes('Sinkhorn')",
    )
    page.goto(f"{page.home}run/mhc-tear/routing")
    chart(page, "routing-experts")
    title = "document.querySelector('#routing-experts .js-plotly-plot').layout.annotations[0].text"
    assert "layer 3" in page.evaluate(title)  # the planted fault's
    page.locator("#routing-layer").click()
    page.get_by_role("option", name="layer 2").click()
    page.wait_for_url(re.compile("layer=2"))
    until(page, f"{title}.includes('layer 2')")
    page.locator(".g-tab a", has_text="Activations").click()
    chart(page, "activations-experts")
    assert "layer 2" in page.evaluate(title.replace("routing-experts", "activations-experts"))


SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => {
  for (const shift of list.getEntries()) window.shifted += shift.value;
}).observe({type: "layout-shift"});
"""
NO_ROOM = """
addEventListener("DOMContentLoaded", () => {
  const style = document.createElement("style");
  style.textContent = ".chart-frame { min-height: 0 !important }";
  document.head.append(style);
});
"""
ALL_DRAWN = (
    "document.querySelectorAll('.chart').length"
    " && [...document.querySelectorAll('.chart')].every("
    "c => c.querySelector('.js-plotly-plot')?.layout?.xaxis?.visible !== false)"
)


def shifted(page, name: str) -> float:
    """How much of the window moved while a page was built, as the browser counts it."""
    page.goto(f"{page.home}run/mhc-tear/{name}")
    until(page, ALL_DRAWN)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)
    return page.evaluate("window.shifted")


def test_nothing_moves_while_a_page_is_built(page):
    page.add_init_script(SHIFTS)
    for name in ("overview", "cascade", "gain", "routing", "activations"):
        assert shifted(page, name) < 0.02, name
    page.add_init_script(NO_ROOM)
    assert shifted(page, "cascade") > 0.05, "where no room is kept, it does"


def test_no_button_of_a_chart_leads_to_another_site(page):
    page.goto(f"{page.home}run/mhc-tear/overview")
    chart(page, "overview-timeline")
    titles = page.evaluate(
        "[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)"
    )
    assert titles == ["Download plot as a PNG", "Reset axes"]


def test_a_run_without_hyper_connections_has_a_notice_and_its_other_charts(page):
    page.goto(f"{page.home}run/plain/gain")
    page.get_by_text("no hyper-connections").wait_for()
    until(
        page,
        "document.querySelector('#gain-heat .js-plotly-plot')"
        "?.data?.some(t => t.type === 'heatmap')",
    )
    assert page.locator("#gain-metric").input_value() == "transport gain"
    assert not page.get_by_text("Maps of one site").is_visible()
    page.locator("#gain-metric").click()
    page.get_by_role("option", name="composite gain").click()
    page.get_by_text("Not recorded: this model has no such map.").wait_for()


def test_in_a_narrow_window_nothing_is_cut_and_charts_keep_their_room(page):
    page.set_viewport_size({"width": 420, "height": 800})
    for name in ("overview", "cascade", "gain", "routing", "activations", "events"):
        page.goto(f"{page.home}run/mhc-tear/{name}")
        page.locator(".card").first.wait_for()
        if name != "events":
            until(page, "document.querySelector('main .chart .main-svg')?.clientWidth >= 600")
        assert page.evaluate("document.documentElement.scrollWidth") == 420
        tabs = page.locator(".tabs").bounding_box()
        assert tabs["y"] > page.locator(".crumb.here").bounding_box()["y"]  # a line of their own
        assert page.locator(".crumb.here").inner_text() == "mhc-tear"


def test_every_page_of_an_empty_run_shows_that_it_waits_for_the_first_step(page):
    for name in ("overview", "cascade", "gain", "routing", "activations", "events"):
        page.goto(f"{page.home}run/empty/{name}")
        page.locator(".card").first.wait_for()
        text = "No events so far." if name == "events" else "Waiting for the first step."
        page.get_by_text(text).first.wait_for()


def test_a_spike_leads_to_its_cascade_and_another_event_to_its_step(page):
    page.goto(f"{page.home}run/mhc-tear/events")
    page.locator(".ag-cell", has_text="loss left its trend").click()
    page.wait_for_url("**/run/mhc-tear/cascade?spike=360")
    page.go_back()
    page.wait_for_load_state(
        "networkidle"
    )  # a row that is clicked while the table is built leads nowhere
    page.locator(".ag-cell", has_text="off → warmup").click()
    page.wait_for_url("**/run/mhc-tear/overview?steps=303-423&step=363")
    chart(page, "overview-timeline")
    assert layout(page, "overview-timeline", "xaxis.range") == [303, 423]


def test_a_finished_run_cannot_be_controlled_and_the_page_gives_the_reason(page):
    page.goto(f"{page.home}run/mhc-tear/overview")
    page.get_by_text("The training is not running").wait_for()
    assert page.locator("#ask-on").is_disabled()
    assert "spike at step 361" in page.locator("#control-state").inner_text()


def test_an_unknown_run_or_page_is_one_line(page):
    page.goto(f"{page.home}run/unknown/gain")
    page.get_by_text("There is no such run here.").wait_for()
    page.goto(f"{page.home}run/plain/nothing")
    page.get_by_text("There is no such page.").wait_for()


def test_without_the_token_the_browser_gets_one_line(chromium, served):
    context = chromium.new_context()
    tab = context.new_page()
    answer = tab.goto(f"http://127.0.0.1:{served.port}/run/plain/overview")
    assert answer.status == 403
    assert "needs its token" in tab.locator("body").inner_text()
    assert tab.locator("script").count() == 0
    context.close()


@pytest.fixture
def live(runs):
    """A run that looks like a running training; the test writes its rows."""
    script = synthetic.RunScript(steps=200, layers=3, seed=5)
    run = synthetic.create(runs / "live", script)
    synthetic.write_rows(run, script, 0, 40)
    run.heartbeat(39)
    run.script = script
    yield run
    run.close()


def test_a_routing_request_is_shown_until_routing_is_on(page, live, runs):
    page.goto(f"{page.home}run/live/overview")
    chart(page, "overview-timeline")
    page.get_by_text("step 39", exact=True).wait_for()
    low, high = zoom(page, "overview-timeline", 0.2, 0.9)

    page.get_by_role("textbox", name="delay in steps").fill("4")
    page.locator("#ask-on").click()
    page.get_by_text("requested: on, Δ = 4").wait_for()
    request = json.loads((runs / "live" / "control.json").read_text())
    assert (request["routing"], request["delay_steps"], request["by"]) == ("on", 4, "dashboard")
    assert "now: off" in page.locator("#control-state").inner_text()

    live.event(
        Event(
            step=40, kind="acknowledge", message="obeyed: routing on (by dashboard)",
            data={"request": request["id"], "obeyed": True, "routing": "on"}, time=time.time(),
        )
    )  # fmt: skip
    live.event(Event(step=40, kind="decision", message="dashboard requested on", time=time.time()))
    columns = live.script.steps_columns(np.arange(40, 60)) | {
        "routing_mode": ["warmup"] * 4 + ["on"] * 16
    }
    live.append("steps", columns)
    live.append("layers", live.script.layers_columns(np.arange(40, 60)))
    page.get_by_text("now: on").wait_for()
    state = page.locator("#control-state").inner_text()
    assert "requested: on" not in state
    assert "since step 44" in state
    assert "dashboard requested on" in state
    page.get_by_text("step 59", exact=True).wait_for()
    assert f"steps={low}-{high}" in page.url  # the zoom survived the refresh
    assert page.locator("#ask-on").get_attribute("data-variant") == "filled"


def test_the_profile_follows_the_newest_step_of_a_live_run(page, live):
    page.goto(f"{page.home}run/live/gain")
    page.get_by_text("step 39, the newest").wait_for()
    chart(page, "gain-heat")
    synthetic.write_rows(live, live.script, 40, 90)
    page.get_by_text("step 89, the newest").wait_for()
    until(
        page, "document.querySelector('#gain-heat .js-plotly-plot')._fullLayout.xaxis.range[1] > 88"
    )
    assert page.url.endswith("/run/live/gain")


def test_a_page_of_a_finished_run_sends_no_more_requests(page):
    page.goto(f"{page.home}run/mhc-tear/overview")
    chart(page, "overview-timeline")
    page.wait_for_timeout(1500)
    requests = []
    page.on("request", lambda r: requests.append(r.post_data or r.url))
    page.wait_for_timeout(3200)
    assert requests == []


def test_opening_a_page_draws_each_chart_once_and_keeps_the_address(page):
    drawn = []
    page.on(
        "request",
        lambda r: drawn.append(json.loads(r.post_data)["output"]) if r.post_data else None,
    )
    page.goto(f"{page.home}run/mhc-tear/gain")
    chart(page, "gain-heat")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)
    assert [
        drawn.count(f"{name}.figure") for name in ("gain-heat", "gain-profile", "gain-matrices")
    ] == [1, 1, 1]
    assert page.url.endswith("/run/mhc-tear/gain")
