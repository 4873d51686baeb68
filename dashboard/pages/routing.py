"""Routing: do the routers still agree with themselves, are they sure, and is the load even."""

import plotly.graph_objects as go
from dash import Dash, html

from geodiag.dashboard import control_panel
from geodiag.dashboard.draw import draws, extent, happened
from geodiag.dashboard.figures.heat import Panel, heat_map
from geodiag.dashboard.figures.lines import Strip, over_steps
from geodiag.dashboard.figures.style import Look, titled
from geodiag.dashboard.layers import layer_of, layer_options, layer_shown, pick_layer, series
from geodiag.dashboard.library import Library
from geodiag.dashboard.parts import card, graph, notice, options, segments, select
from geodiag.dashboard.record import Record
from geodiag.dashboard.steer import Control, steer
from geodiag.dashboard.view import View
from geodiag.dashboard.words import about, metric
from geodiag.schema import ROUTING_MODES

NAME, TITLE = "routing", "Routing"

FLIPS = {
    "flip_rate": "flip rate",
    "flip_top1": "top-1",
    "flip_any": "any of K",
    "flip_rate_router": "router alone",
    "flip_rate_anticipatory": "anticipatory",
}
LOADS = {"load": "load", "gate_mass": "gate mass"}
_MARGINS = {"router_margin_mean": "mean", "router_margin_p10": "p10", "router_margin_p01": "p01"}
_ENTROPY = {"router_entropy": "entropy"}


def layout(record: Record, view: View) -> html.Div:
    flips = card(
        "Flips",
        *_missing(record),
        graph("routing-flips", 260),
        tip=" ".join(f"{label}: {metric('layers', n).help}" for n, label in FLIPS.items()),
        controls=segments("routing-metric", view.metric if view.metric in FLIPS else "flip_rate",
                          options(FLIPS), "kind of flip"),
    )  # fmt: skip
    one = card(
        "One layer",
        graph("routing-load", 220),
        graph("routing-lines", 400),
        tip=" ".join(about(metric("layers", n)) for n in ("max_vio", *_MARGINS, "router_entropy")),
        controls=[
            segments("routing-over", view.over or "load", options(LOADS), "share of"),
            select("routing-layer", str(layer_of(record, view)), layer_options(record), "layer", 120),
        ],
    )  # fmt: skip
    return html.Div(
        [html.Div([flips, one], className="column"), html.Div(control_panel.panel(record), className="side")],
        className="split",
    )


def register(app: Dash, library: Library) -> None:
    draws(app, library, "routing-flips", "figure", _flips)
    draws(app, library, "routing-load", "figure", _load)
    draws(app, library, "routing-lines", "figure", _lines)
    controls = {
        "routing-metric": Control("metric", "flip_rate"),
        "routing-over": Control("over", "load"),
        "routing-layer": Control("layer", lambda pathname, view: layer_shown(library, pathname, view)),
    }
    steer(app, controls, ["routing-flips", "routing-load", "routing-lines"], pick_layer)


def _flips(record: Record, view: View, look: Look) -> go.Figure:
    name = view.metric if view.metric in FLIPS else "flip_rate"
    (grid,) = record.grids("layers", name)
    row = f"{layer_of(record, view)}.ffn"
    return heat_map(
        [Panel(grid, metric("layers", name).help)],
        look,
        view.steps,
        marks=happened(record),
        extent=extent(record),
        row=row,
        nothing=_nothing(record, name),
    )


def _load(record: Record, view: View, look: Look) -> go.Figure:
    name = view.over if view.over in LOADS else "load"
    layer, (grid,) = layer_of(record, view), record.grids("experts", name)
    grid = grid.of_layer(layer)
    title = f"<b>layer {layer}</b>  {metric('experts', name).help}"
    return heat_map(
        [Panel(grid, title)],
        look,
        view.steps,
        marks=happened(record),
        extent=extent(record),
        experts=True,
        centre=1 / max(1, len(grid.rows)),  # an even share
        title="",
        nothing="No experts recorded in this layer.",
    )


def _lines(record: Record, view: View, look: Look) -> go.Figure:
    layer = layer_of(record, view)
    strips = [
        Strip(titled("MaxVio", metric("layers", "max_vio").unit), series(record, layer, {"max_vio": "MaxVio"})),
        Strip(titled("margin", metric("layers", "router_margin_mean").unit), series(record, layer, _MARGINS)),
        Strip(titled("entropy", metric("layers", "router_entropy").unit), series(record, layer, _ENTROPY)),
    ]  # fmt: skip
    return over_steps(
        strips,
        look,
        view.steps,
        marks=happened(record),
        extent=extent(record),
        nothing=f"Layer {layer} has no learned router.",
    )


def _nothing(record: Record, name: str) -> str:
    if not len(record.steps()["step"]):
        return "Waiting for the first step."
    if name == "flip_rate_anticipatory":
        on = (record.steps()["routing_mode"] == ROUTING_MODES.index("on")).any()
        return "Recorded while anticipatory routing is on." + ("" if on else " It has not been on in this run.")
    return "Not recorded in this run."


def _missing(record: Record) -> list:
    found = record.said("found")
    if "routers" in found and not found["routers"]:
        return [notice("This run has no router: it is a dense model, so there is nothing to flip.")]
    return []
