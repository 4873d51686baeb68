"""Page Overview: whether the run is healthy, and if not, since when."""

from typing import Any

import plotly.graph_objects as go
from dash import Dash, html

from geodiag.dashboard.components import control_panel
from geodiag.dashboard.components.basic import card, graph, notice, segments
from geodiag.dashboard.components.text import integer, metric, metric_help
from geodiag.dashboard.components.tiles import tiles
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.data.timeline_marks import routing_spans
from geodiag.dashboard.figures.style import Theme
from geodiag.dashboard.figures.timeline import timeline
from geodiag.dashboard.pages.events import jump
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.live_figures import detected_spikes, event_marks, register_drawing
from geodiag.dashboard.url.url_state import View
from geodiag.dashboard.url.url_sync import Control, sync_url
from geodiag.health import SPIKES

NAME = "overview"
TITLE = "Overview"
_RECENT = 7
STAGES = (
    "Stage scores: distance of the worst layer from its own past in robust z (standard "
    "deviations, estimated from the median). "
    + " ".join(f"Stage {i}: {metric('steps', f'stage{i}_score').help}" for i in (1, 2, 3))
)


def layout(cache: RunCache, view: View) -> html.Div:
    """Return the page: tiles, timeline, control panel, newest events."""
    scale = segments(
        "overview-scale",
        "log" if view.scale == "log" else "linear",
        ["linear", "log"],
        "scale of the loss axis",
    )
    help = f"{metric_help(metric('steps', 'loss'))} {STAGES} Drag to zoom, double click to reset."
    main = card(
        "Loss, gradient norm, stages", graph("overview-timeline", 640), tip=help, controls=scale
    )
    recent = card("Newest events", html.Div(_recent(cache, view), id="overview-recent"))
    side = html.Div([control_panel.panel(cache), recent], className="side")
    return html.Div(
        [
            html.Div(tiles(cache), id="overview-tiles", className="tiles"),
            html.Div([main, side], className="split"),
        ]
    )


def register(app: Dash, library: RunLibrary) -> None:
    """Register the callbacks of the page."""
    register_drawing(app, library, "overview-timeline", "figure", draw_timeline)
    register_drawing(
        app, library, "overview-tiles", "children", lambda cache, view, theme: tiles(cache)
    )
    register_drawing(
        app,
        library,
        "overview-recent",
        "children",
        lambda cache, view, theme: _recent(cache, view),
    )
    sync_url(app, {"overview-scale": Control("scale", "linear")}, ["overview-timeline"], _clicked)


def draw_timeline(cache: RunCache, view: View, theme: Theme) -> go.Figure:
    """Draw loss, gradient norm and stage scores over steps."""
    steps = cache.steps()
    modes = routing_spans(steps["step"], steps["routing_mode"])
    return timeline(
        steps,
        detected_spikes(cache),
        modes,
        theme,
        view.steps,
        view.step,
        view.scale == "log",
        marks=event_marks(cache),
        superseded=cache.superseded(),
    )


def _clicked(pathname: str, view: View, name: str, point: dict) -> View:
    return (
        view.replaced(step=round(point["x"])) if isinstance(point.get("x"), int | float) else view
    )


def _recent(cache: RunCache, view: View) -> list:
    """Return the newest events as links, newest first; a spike links to its cascade."""
    events = cache.events()[::-1]
    newest = events[:_RECENT]
    spike = next((e for e in events if e["kind"] in SPIKES), None)
    if spike is not None and spike not in newest:
        newest[-1] = spike  # keep the link to the cascade of the newest spike
    if not newest:
        return [notice("No events so far. Spikes, decisions and requests will be listed here.")]
    return [_event_link(cache, e) for e in newest]


def _event_link(cache: RunCache, event: dict[str, Any]) -> html.A:
    parts = [
        html.Span(integer(event["step"]), className="when"),
        html.Span(event["kind"], className=f"kind kind-{event['kind']}"),
        html.Span(event["message"] or "", className="what"),
    ]
    return html.A(parts, href=jump(cache, event), className="event")
