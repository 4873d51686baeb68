"""Events as vertical lines across a chart: one colour and one dash per kind, on every page."""

from collections.abc import Sequence

import plotly.graph_objects as go

from geodiag.dashboard.data.step_table import SupersededSteps
from geodiag.dashboard.data.timeline_marks import Mark
from geodiag.dashboard.figures.downsample import downsampled
from geodiag.dashboard.figures.style import Theme, faded, upright

_MOST = 60
_DASH = {"spike": "dash", "early_warning": "dot", "rollback": "solid", "attempt": "dashdot"}


def routing_colour(mode: str, theme: Theme) -> str:
    """Return the colour of a routing mode: warmup, on or drain."""
    return {"warmup": theme.warmup, "on": theme.on, "drain": theme.drain}[mode]


def colour_of(kind: str, theme: Theme) -> str:
    """Return the colour of a kind of event."""
    return {"spike": theme.spike, "early_warning": theme.warn, "rollback": theme.drain}.get(
        kind, theme.cursor
    )


def draw_marks(
    fig: go.Figure,
    marks: Sequence[Mark],
    reach: tuple[float, float],
    theme: Theme,
    domains: Sequence[tuple[float, float]] = ((0.0, 1.0),),
) -> None:
    """Draw a line at each mark within `reach`, in each of the vertical `domains`.

    Only the newest 60 marks are drawn.
    """
    inside = [m for m in marks if reach[0] <= m.step <= reach[1]][-_MOST:]
    shapes = [
        upright(m.step, colour_of(m.kind, theme), _DASH.get(m.kind, "dot"), d)
        for m in inside
        for d in domains
    ]
    fig.update_layout(shapes=[*fig.layout.shapes, *shapes])


def draw_superseded(
    fig: go.Figure,
    superseded: Sequence[SupersededSteps],
    low: int,
    high: int,
    theme: Theme,
    panels: dict[str, str],
) -> None:
    """Draw steps that later attempts replaced as faint lines; `panels`: metric → its y axis."""
    for old in superseded:
        inside = (old.step_S >= low - 1) & (old.step_S <= high + 1)
        for name, y in panels.items():
            points = downsampled(old.step_S[inside], getattr(old, f"{name}_S")[inside])
            fig.add_scatter(
                x=points.x,
                y=points.y,
                yaxis=y,
                mode="lines",
                line={"color": faded(theme.soft, 0.45), "width": 1.2},
                name=f"{name.replace('_', ' ')}, attempt {old.attempt}",
                hovertemplate="%{y:.4g}",
            )
