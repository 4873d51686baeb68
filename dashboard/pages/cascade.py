"""Page Cascade: where a spike started, how it spread, and what would have prevented it.

url.search ─► spike ─► verdict, picture ─► cell (the origin until another one is clicked) ─► the
four cards beside the picture
"""

from functools import partial
from typing import Any, NamedTuple

import plotly.graph_objects as go
from dash import Dash, Input, Output, State, html, no_update

from geodiag.cascade.explain import Cascade
from geodiag.dashboard.cascade import verdict_card
from geodiag.dashboard.cascade.cell_series import cell_series
from geodiag.dashboard.cascade.selection import (
    StageCell,
    cache_of_spike,
    cascade_of,
    cell_of,
    chosen_step,
    scene_in,
    stages_of,
    window_of,
)
from geodiag.dashboard.components.basic import card, graph
from geodiag.dashboard.components.layer_select import sites_of
from geodiag.dashboard.components.table import table
from geodiag.dashboard.components.text import integer, number, percent
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.data.sparse_samples import composite_maps, samples_around, token_trajectories
from geodiag.dashboard.figures.cascade import STAGES, cascade_figure, height_of
from geodiag.dashboard.figures.heat import Panel, heat_map
from geodiag.dashboard.figures.maps import Tile, residual_maps
from geodiag.dashboard.figures.small_multiples import Strip, small_multiples
from geodiag.dashboard.figures.style import Theme, empty
from geodiag.dashboard.figures.trajectory import trajectories
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.live_figures import event_marks, register_drawing
from geodiag.dashboard.url.url_state import View
from geodiag.dashboard.url.url_sync import sync_url

NAME = "cascade"
TITLE = "Cascade"

_EXPERTS = {"load": "share of the layer's assignments", "act_rms": "RMS of the activations"}
_NO_MAPS = "No residual maps near this step. attach(every={'matrices': 10}) samples more of them."
_NO_HYPER = "This model has no hyper-connections, so it has no residual maps."
_NO_TOKENS = "No traced tokens near this step. attach(trace='flipped') traces some."
PICTURE = (
    "Each map shows one stage of the cascade: rows are layers, the first on top; columns are "
    "steps. The colour is the distance of the layer from its own past, in robust z (standard "
    "deviations, estimated from the median). A change that lasts for 64 samples becomes part of "
    "that past. Rings mark where a stage left its usual range; the line leads from the origin to "
    "the loss. Click a cell to see its measurements; drag to zoom in time."
)
"""Explanation of the cascade figure."""
_EVIDENCE = "Metrics that left their usual range at the origin. Click a row to see its series."
_SERIES = "The metrics behind this stage in this layer. The band is their range before the cascade."
_EXPERTS_TIP = "Every expert of the layer. A frame marks the expert of the origin."
_MAPS = (
    "Token means of the residual maps H_res of this layer, and their product from the first site "
    "to this layer (composite map), before the cascade and at the cell. Rows are streams out, "
    "columns streams in; the gain is the largest absolute row sum."
)
_TOKENS = (
    "The same few tokens, followed through the layers in two fixed random projections. The colour "
    "is the expert, a ring marks a changed choice of experts; faint lines are the same tokens "
    "before the cascade."
)


def layout(cache: RunCache, view: View) -> html.Div:
    """Return the page: verdict, picture, evidence, and the four cards of one cell."""
    layers = len({layer for layer, _ in sites_of(cache)})
    rows = _evidence(cache, view)
    main = card(
        "From the origin to the loss", graph("cascade-picture", height_of(layers)), tip=PICTURE
    )
    evidence = card(
        "Evidence",
        table("cascade-evidence", verdict_card.COLUMNS, rows, height=None),
        tip=_EVIDENCE,
        id="cascade-proof",
        style=_hidden_without(rows),
    )
    cell = html.Div(id="cascade-where", className="where")
    side = [
        card("Selected cell", cell, graph("cascade-series", 430), tip=_SERIES),
        card("Experts of the layer", graph("cascade-experts", 250), tip=_EXPERTS_TIP),
    ]
    below = [
        card("Residual maps of the layer", graph("cascade-maps", 200), tip=_MAPS),
        card("Traced tokens", graph("cascade-tokens", 230), tip=_TOKENS),
    ]
    columns = [html.Div([main, evidence], className="column"), html.Div(side, className="side")]
    return html.Div(
        [
            html.Div(verdict_card.spike_links(cache, view), id="cascade-choices"),
            html.Div(_verdict(cache, view), id="cascade-verdict"),
            html.Div(columns, className="split wide-side"),
            html.Div(below, className="pair"),
        ]
    )


def register(app: Dash, library: RunLibrary) -> None:
    """Register the callbacks of the page."""
    draw = partial(register_drawing, app, library)
    draw("cascade-choices", "children", lambda c, v, _: verdict_card.spike_links(c, v))
    draw("cascade-verdict", "children", lambda c, v, _: _verdict(c, v))
    draw("cascade-picture", "figure", draw_picture)
    draw("cascade-evidence", "rowData", lambda c, v, _: _evidence(c, v))
    draw("cascade-proof", "style", lambda c, v, _: _hidden_without(_evidence(c, v)))
    draw("cascade-where", "children", lambda c, v, _: _where(c, v))
    draw("cascade-series", "figure", draw_series)
    draw("cascade-experts", "figure", draw_experts)
    draw("cascade-maps", "figure", _maps)
    draw("cascade-tokens", "figure", _tokens)
    sync_url(app, {}, ["cascade-picture", "cascade-series"], _clicked)

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("cascade-evidence", "cellClicked"),
        State("cascade-evidence", "rowData"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def show(cell, rows, search):
        row = next((r for r in rows or [] if cell and r["id"] == str(cell.get("rowId"))), None)
        if row is None or row["layer"] is None or row["stage"] not in STAGES:
            return no_update
        view = View.parse(search)
        return view.replaced(
            stage=row["stage"], layer=row["layer"], step=row["step"]
        ).query_string()


def _found(cache: RunCache, view: View) -> Cascade | None:
    found = cascade_of(cache, chosen_step(cache, view))
    return found if isinstance(found, Cascade) else None


def _verdict(cache: RunCache, view: View) -> Any:
    return verdict_card.verdict_card(cache, view, cascade_of(cache, chosen_step(cache, view)))


def _evidence(cache: RunCache, view: View) -> list[dict]:
    found = _found(cache, view)
    return verdict_card.evidence_rows(found) if found else []


def _hidden_without(rows: list[dict]) -> dict:
    return {} if rows else {"display": "none"}


def draw_picture(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw the loss above the maps of the three stages, with the path of the cascade."""
    if not len(cache.steps()["step"]):
        return empty("Waiting for the first step.", theme, 420)
    found = _found(cache, view)
    attempt = cache_of_spike(cache, chosen_step(cache, view))
    scene = scene_in(attempt, window_of(attempt, view, found), cache)
    return cascade_figure(scene, theme, found, cell_of(view, found, scene.stages))


class _CellContext(NamedTuple):
    """The cell that the cards beside the picture show."""

    cache: RunCache
    """The run as it was in the attempt of the cascade."""
    cell: StageCell | None
    window: tuple[int, int]
    found: Cascade | None

    @property
    def before(self) -> int:
        """The step before which the values count as usual."""
        step = self.cell.step if self.cell else 0
        if self.found is None or self.found.onset is None:
            return step
        return min(self.found.onset, step)


def _context(cache: RunCache, view: View) -> _CellContext:
    found = _found(cache, view)
    attempt = cache_of_spike(cache, chosen_step(cache, view))
    window = window_of(attempt, view, found)
    some = len(attempt.steps()["step"]) > 0
    return _CellContext(
        attempt,
        cell_of(view, found, stages_of(attempt, window)) if some else None,
        window,
        found,
    )


def _where(cache: RunCache, view: View) -> Any:
    _, cell, _, found = _context(cache, view)
    if cell is None:
        return "Nothing was measured so far."
    origin = found is not None and view.stage is None and found.cause == "layer"
    name = f"layer {cell.layer} · {STAGES[cell.stage][0]} · step {integer(cell.step)}"
    return [html.B(name), ", the origin" if origin else ""]


def draw_series(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw the metrics behind the stage of the cell, each with its usual range."""
    context = _context(cache, view)
    cell = context.cell
    found = context.found
    if cell is None:
        return empty("Nothing was measured so far.", theme, 120)
    rows = found.evidence if found is not None else ()
    first_metrics = [e.metric for e in rows if (e.stage, e.layer) == (cell.stage, cell.layer)]
    strips = []
    for s in cell_series(context.cache, cell, context.window, context.before, first_metrics):
        share = s.metric.unit == "share"
        usual = " to ".join(percent(v) if share else number(v, 3) for v in s.usual or ())
        note = f"usually {usual}" if usual else ""
        strips.append(
            Strip(f"{s.metric.name} · {s.site}", note, s.step_S, s.value_S, s.usual, s.metric.unit)
        )
    nothing = f"Layer {cell.layer} has no measurements of stage {cell.stage}."
    return small_multiples(strips, theme, context.window, cell.step, nothing)


def draw_experts(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw the experts of the layer of the cell over steps."""
    attempt, cell, window, found = _context(cache, view)
    if cell is None:
        return empty("Nothing was measured so far.", theme, 120)
    name = "act_rms" if cell.stage == 1 else "load"
    (grid,) = attempt.memo(
        ("experts", name, window), lambda: attempt.read_steps("experts", [name], *window)
    )
    grid = grid.of_layer(cell.layer)
    mine = found is not None and found.expert is not None and cell.layer == found.layer
    fig = heat_map(
        [Panel(grid, f'<span style="color:{theme.soft}">{_EXPERTS[name]}</span>')],
        theme,
        window,
        marks=[m for m in event_marks(cache) if m.kind == "spike"],
        step=cell.step,
        row=str(found.expert) if found is not None and mine else None,
        experts=True,
        centre=1 / max(1, len(grid.rows)) if name == "load" else None,  # an equal share
        title="",
        nothing=f"No experts were recorded in layer {cell.layer}.",
    )
    fig.update_layout(margin={"l": 48, "r": 60}, xaxis={"nticks": 5, "tickangle": 0})
    return fig


def _maps(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    context = _context(cache, view)
    none = _NO_MAPS if cache.has_maps() else _NO_HYPER
    if context.cell is None:
        return empty(none, theme, 120)
    layer = context.cell.layer
    run = context.cache
    samples = samples_around(run, "matrices", context.before, context.cell.step)
    groups = [
        (f"{name}, step {integer(s)}", [Tile(*t) for t in composite_maps(run, layer, s)])
        for name, s in samples
    ]
    return residual_maps(groups, theme, none)


def _tokens(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    context = _context(cache, view)
    if context.cell is None:
        return empty(_NO_TOKENS, theme, 120)
    samples = samples_around(context.cache, "tokens", context.before, context.cell.step)
    usual = token_trajectories(context.cache, samples[0][1]) if len(samples) == 2 else []
    return trajectories(
        token_trajectories(context.cache, samples[-1][1]) if samples else [],
        usual,
        theme,
        _NO_TOKENS,
    )


def _clicked(pathname: str, view: View, name: str, point: dict) -> View:
    """Select the clicked cell of a map, or the clicked step of a series."""
    x = point.get("x")
    y = str(point.get("y", ""))
    trace = point.get("curveNumber")
    if not isinstance(x, int | float):
        return view
    if name == "cascade-picture" and trace in (0, 1, 2) and y.isdigit():
        return view.replaced(stage=trace + 1, layer=int(y), step=round(x))
    if name == "cascade-series" and view.stage is not None:
        return view.replaced(step=round(x))
    return view
