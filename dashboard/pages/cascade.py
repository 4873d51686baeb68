"""Cascade: where did it start, how did it spread, and what would have stopped it.

url.search ─► spike ─► verdict, picture ─► cell (the origin, until another is clicked) ─► the four
cards beside it
"""

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
from geodiag.dashboard.components.components import card, graph
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

NAME, TITLE = "cascade", "Cascade"

_EXPERTS = {"load": "share of the layer's assignments", "act_rms": "RMS of the activations"}
_NO_MAPS = "No residual maps near this step; attach(every={'matrices': 10}) samples them."
_NO_HYPER = "This model has no hyper-connections, so no residual maps."
_NO_TOKENS = "No traced tokens near this step; attach(trace='flipped') follows some."
PICTURE = (
    "Each map is one stage: a row is a layer, the first on top; a column is a step; the colour says how far the layer "
    "stands from its own past, of which a change that has lasted for 64 samples is part. Rings mark where a stage left "
    "its range, the line leads from the origin to the loss. Click a cell for what was measured there; drag to zoom in "
    "time."
)
"""How the picture is read."""


def layout(cache: RunCache, view: View) -> html.Div:
    tall = height_of(len({layer for layer, _ in sites_of(cache)}))
    main = card("From the origin to the loss", graph("cascade-picture", tall), tip=PICTURE)
    proof = card(
        "Evidence",
        table("cascade-evidence", verdict_card.COLUMNS, _evidence(cache, view), height=None),
        tip="What left its range at the origin. Click a row to see its series.",
        id="cascade-proof",
        style=_only_with_rows(_evidence(cache, view)),
    )
    side = [
        card("In this cell", html.Div(id="cascade-where", className="where"), graph("cascade-series", 430),
             tip="The quantities behind the stage in this layer; the band is where each lay before."),
        card("Its experts", graph("cascade-experts", 250), tip="Every expert of the layer; the frame is the origin's."),
    ]  # fmt: skip
    below = [
        card("Its residual maps", graph("cascade-maps", 200),
             tip="Token means of H_res, alone and multiplied from the first site to this layer; before the cascade and "
             "at the cell. Rows are streams out, columns streams in; the gain is the largest absolute row sum."),
        card("Traced tokens", graph("cascade-tokens", 230),
             tip="The same few tokens, followed down the layers in two fixed random projections. Colour is the expert, "
             "a ring a changed choice; faint lines are the same tokens before the cascade."),
    ]  # fmt: skip
    columns = [html.Div([main, proof], className="column"), html.Div(side, className="side")]
    return html.Div(
        [
            html.Div(verdict_card.spike_links(cache, view), id="cascade-choices"),
            html.Div(_verdict(cache, view), id="cascade-verdict"),
            html.Div(columns, className="split wide-side"),
            html.Div(below, className="pair"),
        ]
    )


def register(app: Dash, library: RunLibrary) -> None:
    register_drawing(
        app,
        library,
        "cascade-choices",
        "children",
        lambda r, v, theme: verdict_card.spike_links(r, v),
    )
    register_drawing(
        app, library, "cascade-verdict", "children", lambda r, v, theme: _verdict(r, v)
    )
    register_drawing(app, library, "cascade-picture", "figure", draw_picture)
    register_drawing(
        app, library, "cascade-evidence", "rowData", lambda r, v, theme: _evidence(r, v)
    )
    register_drawing(
        app, library, "cascade-proof", "style", lambda r, v, theme: _only_with_rows(_evidence(r, v))
    )
    register_drawing(app, library, "cascade-where", "children", lambda r, v, theme: _where(r, v))
    register_drawing(app, library, "cascade-series", "figure", draw_series)
    register_drawing(app, library, "cascade-experts", "figure", draw_experts)
    register_drawing(app, library, "cascade-maps", "figure", _maps)
    register_drawing(app, library, "cascade-tokens", "figure", _tokens)
    sync_url(app, {}, ["cascade-picture", "cascade-series"], _clicked)

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("cascade-evidence", "cellClicked"),
        State("cascade-evidence", "rowData"),
        State("url", "search"),
        prevent_initial_call=True,
    )
    def show(cell, shown, search):
        row = next((r for r in shown or [] if cell and r["id"] == str(cell.get("rowId"))), None)
        if row is None or row["layer"] is None or row["stage"] not in STAGES:
            return no_update
        return (
            View.parse(search)
            .replaced(stage=row["stage"], layer=row["layer"], step=row["step"])
            .query_string()
        )


def _found(cache: RunCache, view: View) -> Cascade | None:
    found = cascade_of(cache, chosen_step(cache, view))
    return found if isinstance(found, Cascade) else None


def _verdict(cache: RunCache, view: View) -> Any:
    return verdict_card.verdict_card(cache, view, cascade_of(cache, chosen_step(cache, view)))


def _evidence(cache: RunCache, view: View) -> list[dict]:
    found = _found(cache, view)
    return verdict_card.evidence_rows(found) if found else []


def _only_with_rows(rows: list[dict]) -> dict:
    return {} if rows else {"display": "none"}


def draw_picture(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    if not len(cache.steps()["step"]):
        return empty("Waiting for the first step.", theme, 420)
    found, cache_then = _found(cache, view), cache_of_spike(cache, chosen_step(cache, view))
    scene = scene_in(cache_then, window_of(cache_then, view, found), cache)
    return cascade_figure(scene, theme, found, cell_of(view, found, scene.stages))


class _Place(NamedTuple):
    """What the cards beside the picture speak of."""

    cache: RunCache
    """The run, as the attempt lived it that the cascade belongs to."""
    cell: StageCell | None
    window: tuple[int, int]
    found: Cascade | None

    @property
    def before(self) -> int:
        """The step up to which things were usual."""
        step = self.cell.step if self.cell else 0
        return (
            step if self.found is None or self.found.onset is None else min(self.found.onset, step)
        )


def _place(cache: RunCache, view: View) -> _Place:
    found, cache_then = _found(cache, view), cache_of_spike(cache, chosen_step(cache, view))
    window = window_of(cache_then, view, found)
    some = len(cache_then.steps()["step"]) > 0
    return _Place(
        cache_then,
        cell_of(view, found, stages_of(cache_then, window)) if some else None,
        window,
        found,
    )


def _where(cache: RunCache, view: View) -> Any:
    _, cell, _, found = _place(cache, view)
    if cell is None:
        return "Nothing is measured yet."
    origin = found is not None and view.stage is None and found.cause == "layer"
    name = f"layer {cell.layer} · {STAGES[cell.stage][0]} · step {integer(cell.step)}"
    return [html.B(name), ", the origin" if origin else ""]


def draw_series(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    at = _place(cache, view)
    cell, found = at.cell, at.found
    if cell is None:
        return empty("Nothing is measured yet.", theme, 120)
    rows = found.evidence if found is not None else ()
    told = [e.metric for e in rows if (e.stage, e.layer) == (cell.stage, cell.layer)]
    strips = []
    for s in cell_series(at.cache, cell, at.window, at.before, told):
        share = s.metric.unit == "share"
        usual = " to ".join(percent(v) if share else number(v, 3) for v in s.usual or ())
        said = f"usually {usual}" if usual else ""
        strips.append(
            Strip(f"{s.metric.name} · {s.site}", said, s.step_S, s.value_S, s.usual, s.metric.unit)
        )
    nothing = f"Layer {cell.layer} has nothing of stage {cell.stage} on record."
    return small_multiples(strips, theme, at.window, cell.step, nothing)


def draw_experts(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    cache_then, cell, window, found = _place(cache, view)
    if cell is None:
        return empty("Nothing is measured yet.", theme, 120)
    name = "act_rms" if cell.stage == 1 else "load"
    (grid,) = cache_then.memo(
        ("experts", name, window), lambda: cache_then.read_steps("experts", [name], *window)
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
        centre=1 / max(1, len(grid.rows)) if name == "load" else None,  # an even share
        title="",
        nothing=f"No experts on record in layer {cell.layer}.",
    )
    fig.update_layout(margin={"l": 48, "r": 60}, xaxis={"nticks": 5, "tickangle": 0})
    return fig


def _maps(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    at = _place(cache, view)
    none = _NO_MAPS if cache.has_maps() else _NO_HYPER
    if at.cell is None:
        return empty(none, theme, 120)
    layer, run = at.cell.layer, at.cache
    there = samples_around(run, "matrices", at.before, at.cell.step)
    groups = [
        (f"{name}, step {integer(s)}", [Tile(*t) for t in composite_maps(run, layer, s)])
        for name, s in there
    ]
    return residual_maps(groups, theme, none)


def _tokens(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    at = _place(cache, view)
    if at.cell is None:
        return empty(_NO_TOKENS, theme, 120)
    there = samples_around(at.cache, "tokens", at.before, at.cell.step)
    usual = token_trajectories(at.cache, there[0][1]) if len(there) == 2 else []
    return trajectories(
        token_trajectories(at.cache, there[-1][1]) if there else [], usual, theme, _NO_TOKENS
    )


def _clicked(pathname: str, view: View, name: str, point: dict) -> View:
    """A click on a map chooses its cell; a click on a series, another step of it."""
    x, y, trace = point.get("x"), str(point.get("y", "")), point.get("curveNumber")
    if not isinstance(x, int | float):
        return view
    if name == "cascade-picture" and trace in (0, 1, 2) and y.isdigit():
        return view.replaced(stage=trace + 1, layer=int(y), step=round(x))
    if name == "cascade-series" and view.stage is not None:
        return view.replaced(step=round(x))
    return view
