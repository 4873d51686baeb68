"""Activations: what is clamped, how large it grew, and which expert grew it."""

import plotly.graph_objects as go
from dash import Dash, html

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
from geodiag.dashboard.words import about, counterfactual, metric

NAME, TITLE = "activations", "Activations"

OVERALL = {
    "clamp_gate_rate": "gate clamped",
    "clamp_up_high_rate": "up clamped, high",
    "clamp_up_low_rate": "up clamped, low",
    "gate_amax": "gate amax",
    "up_amax": "up amax",
    "act_amax": "activation amax",
    "expert_norm_max_median": "expert norm, max / median",
    "expert_norm_min_median": "expert norm, min / median",
    "spectral_norm_gate": "gate weights' norm",
    "spectral_norm_up": "up weights' norm",
    "spectral_norm_down": "down weights' norm",
}
EXPERTS = {"act_rms": "RMS", "act_amax": "amax", "clamp_hits": "clamp hits"}
_CLAMPS = {"clamp_gate_rate": "gate", "clamp_up_high_rate": "up high", "clamp_up_low_rate": "up low"}
_NORMS = {"expert_norm_max_median": "expert norm"}
_AMAX = {"gate_amax": "gate", "up_amax": "up", "act_amax": "activation"}


def layout(record: Record, view: View) -> html.Div:
    overall = card(
        "Over layers and steps",
        *_missing(record),
        graph("activations-heat", 260),
        tip=" ".join(about(metric("layers", n)) for n in list(OVERALL)[:8]),
        controls=select("activations-metric", _overall(view), options(OVERALL), "quantity", 230),
    )  # fmt: skip
    one = card(
        "One layer",
        graph("activations-experts", 220),
        graph("activations-lines", 400),
        tip=" ".join(about(metric("experts", n)) for n in EXPERTS),
        controls=[
            segments("activations-over", view.over if view.over in EXPERTS else "act_rms",
                     options(EXPERTS), "per expert"),
            select("activations-layer", str(layer_of(record, view)), layer_options(record), "layer", 120),
        ],
    )  # fmt: skip
    return html.Div([overall, one], className="column")


def register(app: Dash, library: Library) -> None:
    draws(app, library, "activations-heat", "figure", _heat)
    draws(app, library, "activations-experts", "figure", _experts)
    draws(app, library, "activations-lines", "figure", _lines)
    controls = {
        "activations-metric": Control("metric", "gate_amax"),
        "activations-over": Control("over", "act_rms"),
        "activations-layer": Control("layer", lambda pathname, view: layer_shown(library, pathname, view)),
    }
    steer(app, controls, ["activations-heat", "activations-experts", "activations-lines"], pick_layer)


def _overall(view: View) -> str:
    return view.metric if view.metric in OVERALL else "gate_amax"


def _heat(record: Record, view: View, look: Look) -> go.Figure:
    name = _overall(view)
    (grid,) = record.grids("layers", name)
    title = metric("layers", name).help
    if counterfactual(record.run.manifest, "layers", name):
        title += "  (counterfactual: this model has no clamp)"
    row = f"{layer_of(record, view)}.ffn"
    return heat_map(
        [Panel(grid, title)],
        look,
        view.steps,
        marks=happened(record),
        extent=extent(record),
        row=row,
        nothing=_nothing(record),
    )


def _experts(record: Record, view: View, look: Look) -> go.Figure:
    name = view.over if view.over in EXPERTS else "act_rms"
    layer, (grid,) = layer_of(record, view), record.grids("experts", name)
    title = f"<b>layer {layer}</b>  {metric('experts', name).help}"
    return heat_map(
        [Panel(grid.of_layer(layer), title)],
        look,
        view.steps,
        marks=happened(record),
        extent=extent(record),
        experts=True,
        title="",
        nothing="No experts recorded in this layer.",
    )


def _lines(record: Record, view: View, look: Look) -> go.Figure:
    layer = layer_of(record, view)
    strips = [
        Strip(titled("clamped", metric("layers", "clamp_gate_rate").unit), series(record, layer, _CLAMPS)),
        Strip(titled("amax", metric("layers", "gate_amax").unit), series(record, layer, _AMAX)),
        Strip(titled("max / median", metric("layers", "expert_norm_max_median").unit), series(record, layer, _NORMS)),
    ]  # fmt: skip
    return over_steps(
        strips,
        look,
        view.steps,
        marks=happened(record),
        extent=extent(record),
        nothing=f"Layer {layer} has no gated units.",
    )


def _nothing(record: Record) -> str:
    return (
        "Waiting for the first step."
        if not len(record.steps()["step"])
        else "Not recorded in this run: it has no gated units."
    )


def _missing(record: Record) -> list:
    found = record.said("found")
    if "experts" in found and not found["experts"]:
        return [notice("This run has no experts: the per-expert charts stay empty.")]
    return []
