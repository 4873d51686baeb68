"""Page Routing: stability, confidence and load balance of the routers."""

import plotly.graph_objects as go
from dash import Dash, html

from geodiag.dashboard.components import control_panel, layer_charts
from geodiag.dashboard.components.basic import card, graph, notice, options, segments
from geodiag.dashboard.components.layer_charts import Lines, all_layers, experts, lines, one_layer
from geodiag.dashboard.components.layer_select import layers_of
from geodiag.dashboard.components.text import metric, metric_help
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.figures.heat import height_of
from geodiag.dashboard.figures.style import Theme
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.url_state import View
from geodiag.metrics.registry import menu, panels
from geodiag.metrics.schema import ROUTING_MODES

NAME = "routing"
TITLE = "Routing"

FLIPS = menu(NAME)
LOADS = menu(NAME, "experts")
LINES: Lines = panels(NAME)


def layout(cache: RunCache, view: View) -> html.Div:
    """Return the page: flips of all layers, one layer in detail, the control panel."""
    flips = card(
        "Changed expert choices (flips)",
        *_missing(cache),
        graph("routing-flips", height_of([len(layers_of(cache))])),
        tip=" ".join(f"{label}: {metric('layers', n).help}" for n, label in FLIPS.items()),
        controls=segments("routing-metric", _flip(view), options(FLIPS), "kind of flip"),
    )
    tip = " ".join(metric_help(metric("layers", n)) for _, names in LINES for n in names)
    one = one_layer(NAME, cache, view, LOADS, "load", "share of", tip)
    return html.Div(
        [
            html.Div([flips, one], className="column"),
            html.Div(control_panel.panel(cache), className="side"),
        ],
        className="split",
    )


def register(app: Dash, library: RunLibrary) -> None:
    """Register the callbacks of the page."""
    charts = {"flips": draw_flips, "experts": _experts, "lines": draw_lines}
    layer_charts.register(app, library, NAME, charts, "flip_rate", "load")


def _flip(view: View) -> str:
    return view.metric if view.metric in FLIPS else "flip_rate"


def draw_flips(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw the selected flip rate of every layer over steps."""
    name = _flip(view)
    return all_layers(cache, view, theme, name, metric("layers", name).help, _nothing(cache, name))


def _experts(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    return experts(cache, view, theme, view.over if view.over in LOADS else "load", shares=True)


def draw_lines(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw load balance, margins and entropy of the selected layer."""
    return lines(cache, view, theme, LINES, "learned router")


def _nothing(cache: RunCache, name: str) -> str:
    if not len(cache.steps()["step"]):
        return "Waiting for the first step."
    if name == "flip_rate_anticipatory":
        on = (cache.steps()["routing_mode"] == ROUTING_MODES.index("on")).any()
        return "Recorded only while anticipatory routing is on." + (
            "" if on else " It was never on in this run."
        )
    return "Not recorded in this run."


def _missing(cache: RunCache) -> list:
    found = cache.manifest_section("found")
    if "routers" in found and not found["routers"]:
        return [
            notice("This model has no router: it is dense, so no choice of experts can change.")
        ]
    return []
