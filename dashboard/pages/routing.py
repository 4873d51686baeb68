"""Routing: do the routers still agree with themselves, are they sure, and is the load even."""

import plotly.graph_objects as go
from dash import Dash, html

from geodiag.dashboard.components import control_panel, layer_charts
from geodiag.dashboard.components.components import card, graph, notice, options, segments
from geodiag.dashboard.components.layer_charts import Lines, all_layers, experts, lines, one_layer
from geodiag.dashboard.components.layer_select import layers_of
from geodiag.dashboard.components.text import about, metric
from geodiag.dashboard.data.run_cache import Record
from geodiag.dashboard.figures.heat import height_of
from geodiag.dashboard.figures.style import Look
from geodiag.dashboard.server.run_library import Library
from geodiag.dashboard.url.url_state import View
from geodiag.metrics.schema import ROUTING_MODES

NAME, TITLE = "routing", "Routing"

FLIPS = {
    "flip_rate": "flip rate",
    "flip_top1": "top-1",
    "flip_any": "any of K",
    "flip_rate_router": "router alone",
    "flip_rate_anticipatory": "anticipatory",
}
LOADS = {"load": "load", "gate_mass": "gate mass"}
LINES: Lines = (
    ("MaxVio", {"max_vio": "MaxVio"}),
    (
        "margin",
        {"router_margin_mean": "mean", "router_margin_p10": "p10", "router_margin_p01": "p01"},
    ),
    ("entropy", {"router_entropy": "entropy"}),
)


def layout(record: Record, view: View) -> html.Div:
    flips = card(
        "Flips",
        *_missing(record),
        graph("routing-flips", height_of([len(layers_of(record))])),
        tip=" ".join(f"{label}: {metric('layers', n).help}" for n, label in FLIPS.items()),
        controls=segments("routing-metric", _flip(view), options(FLIPS), "kind of flip"),
    )
    tip = " ".join(about(metric("layers", n)) for _, names in LINES for n in names)
    one = one_layer(NAME, record, view, LOADS, "load", "share of", tip)
    return html.Div(
        [
            html.Div([flips, one], className="column"),
            html.Div(control_panel.panel(record), className="side"),
        ],
        className="split",
    )


def register(app: Dash, library: Library) -> None:
    charts = {"flips": draw_flips, "experts": _experts, "lines": draw_lines}
    layer_charts.register(app, library, NAME, charts, "flip_rate", "load")


def _flip(view: View) -> str:
    return view.metric if view.metric in FLIPS else "flip_rate"


def draw_flips(record: Record, view: View, look: Look) -> go.Figure:
    name = _flip(view)
    return all_layers(record, view, look, name, metric("layers", name).help, _nothing(record, name))


def _experts(record: Record, view: View, look: Look) -> go.Figure:
    return experts(record, view, look, view.over if view.over in LOADS else "load", shares=True)


def draw_lines(record: Record, view: View, look: Look) -> go.Figure:
    return lines(record, view, look, LINES, "learned router")


def _nothing(record: Record, name: str) -> str:
    if not len(record.steps()["step"]):
        return "Waiting for the first step."
    if name == "flip_rate_anticipatory":
        on = (record.steps()["routing_mode"] == ROUTING_MODES.index("on")).any()
        return "Recorded while anticipatory routing is on." + (
            "" if on else " It has not been on in this run."
        )
    return "Not recorded in this run."


def _missing(record: Record) -> list:
    found = record.said("found")
    if "routers" in found and not found["routers"]:
        return [notice("This run has no router: it is a dense model, so there is nothing to flip.")]
    return []
