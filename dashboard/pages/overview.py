"""Overview: is it healthy, and if not, when did it begin."""

import plotly.graph_objects as go
from dash import Dash, html

from geodiag.dashboard.components import control_panel
from geodiag.dashboard.components.components import card, graph, notice, segments
from geodiag.dashboard.components.text import about, metric, whole
from geodiag.dashboard.components.tiles import tiles
from geodiag.dashboard.data.run_cache import Record
from geodiag.dashboard.data.timeline_marks import spans
from geodiag.dashboard.figures.style import Look
from geodiag.dashboard.figures.timeline import timeline
from geodiag.dashboard.pages.events import jump
from geodiag.dashboard.server.run_library import Library
from geodiag.dashboard.url.live_figures import draws, happened, raised
from geodiag.dashboard.url.url_state import View
from geodiag.dashboard.url.url_sync import Control, steer
from geodiag.health import SPIKES

NAME, TITLE = "overview", "Overview"
_RECENT = 7
STAGES = "Robust z of the worst layer against its own past. " + " ".join(
    f"Stage {i}: {metric('steps', f'stage{i}_score').help}" for i in (1, 2, 3)
)


def layout(record: Record, view: View) -> html.Div:
    scale = segments(
        "overview-scale",
        "log" if view.scale == "log" else "linear",
        ["linear", "log"],
        "scale of the loss axis",
    )
    help = f"{about(metric('steps', 'loss'))} {STAGES} Drag to zoom, double click for all."
    main = card("Loss, gradient, stages", graph("overview-timeline", 640), tip=help, controls=scale)
    recent = card("What happened", html.Div(_recent(record, view), id="overview-recent"))
    side = html.Div([control_panel.panel(record), recent], className="side")
    return html.Div(
        [
            html.Div(tiles(record), id="overview-tiles", className="tiles"),
            html.Div([main, side], className="split"),
        ]
    )


def register(app: Dash, library: Library) -> None:
    draws(app, library, "overview-timeline", "figure", draw_timeline)
    draws(app, library, "overview-tiles", "children", lambda record, view, look: tiles(record))
    draws(
        app,
        library,
        "overview-recent",
        "children",
        lambda record, view, look: _recent(record, view),
    )
    steer(app, {"overview-scale": Control("scale", "linear")}, ["overview-timeline"], _clicked)


def draw_timeline(record: Record, view: View, look: Look) -> go.Figure:
    steps = record.steps()
    modes = spans(steps["step"], steps["routing_mode"])
    return timeline(
        steps,
        raised(record),
        modes,
        look,
        view.steps,
        view.step,
        view.scale == "log",
        marks=happened(record),
        undone=record.undone(),
    )


def _clicked(pathname: str, view: View, name: str, point: dict) -> View:
    return view.but(step=round(point["x"])) if isinstance(point.get("x"), int | float) else view


def _recent(record: Record, view: View) -> list:
    """The newest events, newest first; each leads to its step, a spike to its cascade."""
    trail = record.events()[::-1]
    newest = trail[:_RECENT]
    spike = next((e for e in trail if e["kind"] in SPIKES), None)
    if spike is not None and spike not in newest:
        newest[-1] = spike  # whatever happened since, the way to its cascade stays
    if not newest:
        return [notice("Nothing yet. Spikes, decisions and requests will be listed here.")]
    return [
        html.A(
            [html.Span(whole(e["step"]), className="when"), html.Span(e["kind"], className=f"kind kind-{e['kind']}"),
             html.Span(e["message"] or "", className="what")],
            href=jump(record, e), className="event",
        )
        for e in newest
    ]  # fmt: skip
