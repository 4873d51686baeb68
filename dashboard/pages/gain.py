"""Page Gain: how much every layer amplifies its input, over steps and over depth."""

from functools import partial

import plotly.graph_objects as go
from dash import Dash, dcc, html

from geodiag.dashboard.components.basic import (
    aria,
    card,
    graph,
    notice,
    options,
    segments,
    select,
)
from geodiag.dashboard.components.layer_select import sites_of
from geodiag.dashboard.components.text import integer
from geodiag.dashboard.data.grid import row_name
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.data.sparse_samples import site_matrices
from geodiag.dashboard.figures.depth_profile import Curve, profile
from geodiag.dashboard.figures.heat import Panel, heat_map, height_of
from geodiag.dashboard.figures.matrix import map_matrices
from geodiag.dashboard.figures.style import Theme, empty
from geodiag.dashboard.figures.time_bins import binned, worst_step
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.live_figures import event_marks, register_drawing, step_extent
from geodiag.dashboard.url.url_state import View
from geodiag.dashboard.url.url_sync import Control, sync_url
from geodiag.metrics.registry import quantities
from geodiag.metrics.schema import METRICS, SITES

NAME = "gain"
TITLE = "Gain"

_OVER = {"mean": "mean", "max": "worst token", "min": "smallest", "of_mean": "of mean map"}
QUANTITIES = quantities(NAME)
_WAYS = ("forward", "backward")
_MAIN = (
    "Rows are residual sites (attention and feed-forward of each layer), the first on top. A gain "
    "above 1 amplifies the streams, a gain below 1 damps them. The composite gain is the gain of "
    "all maps between the site and the input (forward) or the output (backward). Click a cell to "
    "select its step and site; drag to zoom in time."
)
_DEPTH = (
    "Every site at one step. Forward gains multiply from the input, backward gains from the output."
)
_MAPS = "Token means at the newest sample up to the step. Rows are streams out, columns streams in."


def quantity(cache: RunCache, view: View) -> str:
    """Return the selected quantity; by default composite gain, without maps transport gain."""
    if view.metric in QUANTITIES:
        return view.metric
    return "composite" if cache.has_maps() else "transport"


def chosen_metrics(cache: RunCache, view: View) -> tuple[str, ...]:
    """Return the selected metrics; an unknown reduction over tokens gives the first one."""
    over = QUANTITIES[quantity(cache, view)][1]
    return over.get(view.over or "mean") or next(iter(over.values()))


def layout(cache: RunCache, view: View) -> html.Div:
    """Return the page: a map over layers and steps, a profile over depth, the maps of one site."""
    side = html.Div([_depth_card(cache, view), _maps_card(cache, view)], className="side")
    return html.Div([_main_card(cache, view), side], className="split wide-side")


def _main_card(cache: RunCache, view: View) -> html.Section:
    quantities = options({k: v[0] for k, v in QUANTITIES.items()})
    over = view.over if view.over in _OVER else "mean"
    controls = [
        select("gain-metric", quantity(cache, view), quantities, "quantity"),
        segments("gain-over", over, options(_OVER), "over tokens"),
    ]
    rows = [len(sites_of(cache))] * len(chosen_metrics(cache, view))
    return card(
        "Over layers and steps",
        html.Div(_missing(cache), id="gain-missing"),
        graph("gain-heat", height_of(rows)),
        tip=_MAIN,
        controls=controls,
    )


def _depth_card(cache: RunCache, view: View) -> html.Section:
    slider = dcc.Slider(
        id="gain-step",
        min=0,
        max=max(1, _last(cache)),
        step=1,
        marks=None,
        value=step_of(cache, view) or 0,
        updatemode="mouseup",
        tooltip={"placement": "bottom"},
        allow_direct_input=False,
    )
    return card(
        "Over depth",
        html.Div(id="gain-where", className="where"),
        html.Div(slider, className="slider", **aria("step")),
        graph("gain-profile", 310),
        tip=_DEPTH,
    )


def _maps_card(cache: RunCache, view: View) -> html.Section:
    site = row_name(_site(cache, view))
    return card(
        "Maps of one site",
        html.Div(id="gain-site", className="where"),
        graph("gain-matrices", 250),
        controls=select("gain-site-choice", site, _sites(cache), "site", 110),
        tip=_MAPS,
        style={} if cache.has_maps() else {"display": "none"},
    )


def register(app: Dash, library: RunLibrary) -> None:
    """Register the callbacks of the page."""
    draw = partial(register_drawing, app, library)
    draw("gain-heat", "figure", draw_heat)
    draw("gain-profile", "figure", draw_profile)
    draw("gain-matrices", "figure", _matrices)
    draw("gain-where", "children", lambda c, v, _: _when(c, v))
    draw("gain-site", "children", lambda c, v, _: _where(c, v))
    draw("gain-step", "max", lambda c, v, _: max(1, _last(c)))
    draw("gain-missing", "children", lambda c, v, _: _missing(c))
    controls = {
        "gain-metric": Control("metric", partial(_default_quantity, library)),
        "gain-over": Control("over", "mean"),
        "gain-site-choice": Control("site", partial(_worst_site, library)),
        "gain-step": Control("step", partial(_newest, library)),
    }
    sync_url(app, controls, ["gain-heat", "gain-profile"], partial(_clicked, library))


def step_of(cache: RunCache, view: View) -> int | None:
    """Return the selected step, else the newest step in view."""
    if view.step is not None:
        return view.step
    last = _last(cache) if len(cache.steps()["step"]) else None
    return last if view.high is None or last is None else min(view.high, last)


def draw_heat(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw the selected metrics of every site over steps."""
    grids = cache.grids("layers", *chosen_metrics(cache, view))
    panels = [Panel(g, _sentence(g.metric.name, theme)) for g in grids]
    site = row_name(view.site) if view.site else None
    waiting = (
        "Waiting for the first step."
        if not len(cache.steps()["step"])
        else "Not recorded: this model has no such map."
    )
    return heat_map(
        panels,
        theme,
        view.steps,
        marks=event_marks(cache),
        step_extent=step_extent(cache),
        step=view.step,
        row=site,
        nothing=waiting,
    )


def draw_profile(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw the selected metrics of every site at one step."""
    step = step_of(cache, view)
    if step is None:
        return empty("Waiting for the first step.", theme, 310)
    grids = [g.measured() for g in cache.grids("layers", *chosen_metrics(cache, view))]
    curves = [Curve(_way(g.metric.name), g, g.at(step)) for g in grids if g.rows]
    return profile(curves, theme, row_name(view.site) if view.site else None)


def _matrices(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    step = step_of(cache, view)
    layer, site = _site(cache, view)
    found = site_matrices(cache, layer, SITES[site], step) if step is not None else None
    return map_matrices(found[1] if found else {}, theme)


def _when(cache: RunCache, view: View) -> str:
    return f"step {integer(step_of(cache, view))}" + (", the newest" if view.step is None else "")


def _where(cache: RunCache, view: View) -> str:
    step = step_of(cache, view)
    site = _site(cache, view)
    found = site_matrices(cache, site[0], SITES[site[1]], step) if step is not None else None
    return (
        f"{row_name(site)}, sampled at step {integer(found[0])}"
        if found
        else f"{row_name(site)}, never sampled"
    )


def _site(cache: RunCache, view: View) -> tuple[int, int]:
    """Return the selected site, else the site with the highest composite gain now."""
    if view.site is not None:
        return view.site
    worst = [w for g in cache.recent("layers", "composite_gain_fwd", back=20) if (w := g.worst())]
    return worst[0][2] if worst else (0, 0)


def _sites(cache: RunCache) -> list[str]:
    return [row_name(r) for r in sites_of(cache) or [(0, 0)]]


def _default_quantity(library: RunLibrary, pathname: str, view: View) -> str | None:
    cache = library.at_address(pathname)
    return quantity(cache, view.replaced(metric=None)) if cache else None


def _worst_site(library: RunLibrary, pathname: str, view: View) -> str | None:
    cache = library.at_address(pathname)
    return row_name(_site(cache, view)) if cache else None


def _clicked(library: RunLibrary, pathname: str, view: View, name: str, point: dict) -> View:
    cache = library.at_address(pathname)
    site = View.parse(f"?site={point.get('y')}").site
    if cache is None or site is None:
        return view
    if name == "gain-profile":
        return view.replaced(site=site)
    grid = cache.grids("layers", *chosen_metrics(cache, view))[
        point.get("curveNumber", 0) % len(chosen_metrics(cache, view))
    ]
    grid = grid.window(view.low, view.high)
    column = binned(grid.measured())
    step = worst_step(
        grid, grid.rows.index(site), round(point["x"] - (column.width - 1) / 2), column.width
    )
    return view.replaced(site=site, step=round(point["x"]) if step is None else step)


def _newest(library: RunLibrary, pathname: str, view: View) -> int:
    cache = library.at_address(pathname)
    return (step_of(cache, view) if cache else None) or 0


def _missing(cache: RunCache) -> list:
    if cache.has_maps():
        return []
    return [
        notice(
            "This model has no hyper-connections, so it has no residual maps and no composite "
            "gain. Transport gain, stream norms and gradient norms are recorded."
        )
    ]


def _sentence(name: str, theme: Theme) -> str:
    way = f"<b>{_way(name)}</b>  " if "fwd" in name or "bwd" in name else ""
    return f'{way}<span style="color:{theme.soft}">{METRICS["layers", name].help}</span>'


def _way(name: str) -> str:
    return _WAYS[0] if "_fwd" in name else _WAYS[1] if "_bwd" in name else name.replace("_", " ")


def _last(cache: RunCache) -> int:
    step_S = cache.steps()["step"]
    return int(step_S[-1]) if len(step_S) else 0
