"""Charts that the pages Routing and Activations share: all layers over steps, and one layer."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from dash import Dash, html

from geodiag.dashboard.components.basic import card, graph, options, segments, select
from geodiag.dashboard.components.layer_select import (
    experts_of,
    layer_of,
    layer_options,
    layer_shown,
    pick_layer,
    series,
)
from geodiag.dashboard.components.text import metric
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.figures.heat import Panel, heat_map, height_of
from geodiag.dashboard.figures.lines import Strip, over_steps
from geodiag.dashboard.figures.style import Theme
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.live_figures import (
    DrawFunction,
    event_marks,
    register_drawing,
    step_extent,
)
from geodiag.dashboard.url.url_state import View
from geodiag.dashboard.url.url_sync import Control, sync_url

Lines = Sequence[tuple[str, Mapping[str, str]]]
"""Panels from top to bottom: title, and metric → label."""


def one_layer(
    page: str,
    cache: RunCache,
    view: View,
    over: Mapping[str, str],
    first: str,
    label: str,
    tip: str,
) -> html.Section:
    """Return the card of one layer: a map of its experts by a metric of `over`, and lines."""
    shown = view.over if view.over is not None and view.over in over else first
    return card(
        "One layer",
        graph(f"{page}-experts", height_of([experts_of(cache, layer_of(cache, view))])),
        graph(f"{page}-lines", 460),
        tip=tip,
        controls=[
            segments(f"{page}-over", shown, options(over), label),
            select(f"{page}-layer", str(layer_of(cache, view)), layer_options(cache), "layer", 120),
        ],
    )  # fmt: skip


def register(
    app: Dash,
    library: RunLibrary,
    page: str,
    charts: Mapping[str, DrawFunction],
    metric_first: str,
    over_first: str,
) -> None:
    """Register the callbacks of a page: its charts, its metric, its layer, clicks on a layer."""
    for chart, make in charts.items():
        register_drawing(app, library, f"{page}-{chart}", "figure", make)
    controls = {
        f"{page}-metric": Control("metric", metric_first),
        f"{page}-over": Control("over", over_first),
        f"{page}-layer": Control(
            "layer", lambda pathname, view: layer_shown(library, pathname, view)
        ),
    }
    sync_url(app, controls, [f"{page}-{chart}" for chart in charts], pick_layer)


def all_layers(
    cache: RunCache, view: View, theme: Theme, name: str, title: str, nothing: str
) -> go.Figure:
    """Draw one metric of every layer; a frame marks the selected layer."""
    (grid,) = cache.grids("layers", name)
    return heat_map(
        [Panel(grid, title)],
        theme,
        view.steps,
        marks=event_marks(cache),
        step_extent=step_extent(cache),
        row=f"{layer_of(cache, view)}.ffn",
        nothing=nothing,
    )


def experts(
    cache: RunCache, view: View, theme: Theme, name: str, shares: bool = False
) -> go.Figure:
    """Draw one metric of every expert of the selected layer.

    With `shares`, the colours are centred on an equal share per expert.
    """
    layer = layer_of(cache, view)
    (grid,) = cache.grids("experts", name)
    mine = grid.of_layer(layer)
    return heat_map(
        [Panel(mine, f"<b>layer {layer}</b>  {metric('experts', name).help}")],
        theme,
        view.steps,
        marks=event_marks(cache),
        step_extent=step_extent(cache),
        experts=True,
        centre=1 / max(1, len(mine.rows)) if shares else None,
        title="",
        nothing="No experts were recorded in this layer.",
    )


def lines(cache: RunCache, view: View, theme: Theme, strips: Lines, lacks: str) -> go.Figure:
    """Draw series of the selected layer; `lacks` names what a layer without series lacks."""
    layer = layer_of(cache, view)
    # Read all metrics at once instead of once per panel.
    cache.grids("layers", *(name for _, names in strips for name in names))
    shown = [
        Strip(title, series(cache, layer, names), metric("layers", next(iter(names))).unit)
        for title, names in strips
    ]
    return over_steps(
        shown,
        theme,
        view.steps,
        marks=event_marks(cache),
        step_extent=step_extent(cache),
        nothing=f"Layer {layer} has no {lacks}.",
    )
