"""Page Activations: how often activations are clamped, how large they grow, in which expert."""

import plotly.graph_objects as go
from dash import Dash, html

from geodiag.dashboard.components import layer_charts
from geodiag.dashboard.components.basic import card, graph, notice, options, select
from geodiag.dashboard.components.layer_charts import Lines, all_layers, experts, lines, one_layer
from geodiag.dashboard.components.layer_select import layers_of
from geodiag.dashboard.components.text import counterfactual, metric, metric_help
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.figures.heat import height_of
from geodiag.dashboard.figures.style import Theme
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.url_state import View
from geodiag.metrics.registry import menu, panels

NAME = "activations"
TITLE = "Activations"

OVERALL = menu(NAME)
EXPERTS = menu(NAME, "experts")
LINES: Lines = panels(NAME)


def layout(cache: RunCache, view: View) -> html.Div:
    """Return the page: one metric of all layers, and one layer in detail."""
    overall = card(
        "Over layers and steps",
        *_missing(cache),
        graph("activations-heat", height_of([len(layers_of(cache))])),
        tip=" ".join(metric_help(metric("layers", n)) for n in list(OVERALL)[:8]),
        controls=select("activations-metric", _overall(view), options(OVERALL), "quantity", 230),
    )
    tip = (
        " ".join(metric_help(metric("experts", n)) for n in EXPERTS)
        + " An empty cell: no token was routed to the expert."
    )
    return html.Div(
        [overall, one_layer(NAME, cache, view, EXPERTS, "act_rms", "per expert", tip)],
        className="column",
    )


def register(app: Dash, library: RunLibrary) -> None:
    """Register the callbacks of the page."""
    charts = {"heat": draw_heat, "experts": _experts, "lines": draw_lines}
    layer_charts.register(app, library, NAME, charts, "gate_amax", "act_rms")


def _overall(view: View) -> str:
    return view.metric if view.metric in OVERALL else "gate_amax"


def draw_heat(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw the selected metric of every layer over steps."""
    name = _overall(view)
    title = metric("layers", name).help
    if counterfactual(cache.run.manifest, "layers", name):
        title += "  (this model has no clamp: hits that a clamp would have)"
    return all_layers(cache, view, theme, name, title, _nothing(cache))


def _experts(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    return experts(cache, view, theme, view.over if view.over in EXPERTS else "act_rms")


def draw_lines(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw the clamp rates and maxima of the selected layer."""
    return lines(cache, view, theme, LINES, "gated units")


def _nothing(cache: RunCache) -> str:
    return (
        "Waiting for the first step."
        if not len(cache.steps()["step"])
        else "Not recorded: this model has no gated units."
    )


def _missing(cache: RunCache) -> list:
    found = cache.manifest_section("found")
    if "experts" in found and not found["experts"]:
        return [notice("This model has no experts, so the charts per expert stay empty.")]
    return []
