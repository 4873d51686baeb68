"""Colours, axes and texts that all charts share, in a light and in a dark theme."""

from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go

from geodiag.dashboard.figures.colours import Scale, diverging, sequential

_LINE = 46
"""Characters per line of a sentence in the narrowest card."""
FEW_STEPS = 9
"""A time axis with fewer steps has a tick at each of them."""
EMPTY_PX = 220
"""Default height of a sentence in place of a chart."""
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Theme:
    """One colour theme."""

    name: str
    ink: str
    soft: str
    """Colour of ticks, axis titles and notes."""
    line: str
    """Grid lines and frames."""
    paper: str
    spike: str
    """Spikes and other alarms."""
    forward: str
    backward: str
    warn: str
    """Early warnings."""
    warmup: str
    on: str
    drain: str
    cursor: str
    heat: Scale
    """For metrics that are bad when high: from the paper colour to a deep one."""
    gain: Scale
    """For gains: the middle is a gain of 1."""
    series: tuple[str, ...] = ()
    """Lines of one chart; they differ in hue and in lightness."""


LIGHT = Theme(
    name="light",
    ink="#1d2433",
    soft="#667085",
    line="#e7eaf0",
    paper="#ffffff",
    spike="#d6336c",
    forward="#6d3fc0",
    backward="#c2620a",
    warn="#b35c00",
    warmup="#e8a33d",
    on="#159a72",
    drain="#5b8def",
    cursor="#98a2b3",
    heat=sequential(["#fbfafd", "#d5c3e8", "#8b4bb0", "#2d0a3d"]),
    gain=diverging(["#faf9fb", "#8fbce0", "#0b3d77"], ["#faf9fb", "#f0a35f", "#6b1d0a"]),
    series=("#1d2433", "#7c53c3", "#0e8f9c", "#c2620a"),
)
DARK = Theme(
    name="dark",
    ink="#e6e9f0",
    soft="#98a2b3",
    line="#2a303c",
    paper="#171b23",
    spike="#ff6b9d",
    forward="#b795ff",
    backward="#f3a75c",
    warn="#ffb454",
    warmup="#f0b35a",
    on="#3ecf9d",
    drain="#7ba6ff",
    cursor="#667085",
    heat=sequential(["#1b1f29", "#5c2f86", "#cf5d9b", "#ffe9c9"]),
    gain=diverging(["#1d212b", "#2f73ad", "#b8e2ff"], ["#1d212b", "#b5591c", "#ffdfae"]),
    series=("#ccd3df", "#b795ff", "#4cc9d6", "#f3a75c"),
)
THEMES = {"light": LIGHT, "dark": DARK}


def base(theme: Theme, height: int, **layout: Any) -> go.Figure:
    """Return an empty figure in this theme."""
    fig = go.Figure()
    fig.update_layout(
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 12, "color": theme.soft},
        margin={"l": 92, "r": 84, "t": 6, "b": 42},
        hoverlabel={
            "bgcolor": theme.paper,
            "bordercolor": theme.line,
            "font": {"family": FONT, "color": theme.ink},
        },
        dragmode="zoom",
        showlegend=False,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": theme.cursor, "activecolor": theme.ink},
        **layout,
    )
    return fig


def axis(theme: Theme, title: str = "", **more: Any) -> dict:
    """Return an axis with a thin grid, without a box; the title names the unit."""
    return {
        "title": {"text": title, "font": {"size": 12, "color": theme.ink}, "standoff": 8},
        "gridcolor": theme.line,
        "zeroline": False,
        "linecolor": theme.line,
        "tickfont": {"size": 11, "color": theme.soft},
        "fixedrange": True,
        "automargin": False,
    } | more


def time_axis(
    theme: Theme, reach: tuple[float, float] | None, title: str = "step", **more: Any
) -> dict:
    """Return the axis of steps; a drag zooms it. `reach` sets its range."""
    given: dict[str, Any] = {"range": list(reach)} if reach else {}
    if reach and reach[1] - reach[0] < FEW_STEPS:
        given["dtick"] = 1  # no ticks between two steps
    # The range comes from the address; it replaces the zoom that the browser remembers.
    usual: dict[str, Any] = {
        "fixedrange": False,
        "tickformat": ",d",
        "nticks": 9,
        "uirevision": str(reach),
    }
    usual["unifiedhovertitle"] = {"text": "step %{x:,d}"}
    return axis(theme, title, **usual | given | more)


def upright(x: float, colour: str, dash: str, domain: tuple[float, float] = (0, 1)) -> dict:
    """Return a vertical line at one step, over part of the height of the figure."""
    line = {"color": colour, "width": 1, "dash": dash}
    return {
        "type": "line",
        "x0": x,
        "x1": x,
        "y0": domain[0],
        "y1": domain[1],
        "yref": "paper",
        "line": line,
        "opacity": 0.75,
    }


def ticks_of(unit: str) -> str:
    """Return the number format of an axis: percent for shares."""
    return ".3~p" if unit == "share" else ".3~g"


def titled(name: str, unit: str) -> str:
    """Return `loss, nats/token`; pure numbers and shares need no unit."""
    return name if unit in ("1", "", "share") else f"{name}, {unit}"


def empty(text: str, theme: Theme, height: int = EMPTY_PX) -> go.Figure:
    """Return a figure that shows a sentence in place of a chart."""
    fig = base(theme, height)
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False)
    lines = "<br>".join(wrap(text, _LINE))
    fig.add_annotation(
        text=lines, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", font={"size": 14}
    )
    return fig


def axis_number(i: int) -> str:
    """Return the suffix of Plotly's axis number `i`, counted from 1: `""`, `"2"`, `"3"`."""
    return "" if i == 1 else str(i)


def legend_above(theme: Theme) -> dict[str, Any]:
    """Return a horizontal legend above the plot."""
    place: dict[str, Any] = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
    return place | {"font": {"size": 12, "color": theme.ink}}


def add_text(
    fig: go.Figure, text: str, x: float, y: float, colour: str, size: float = 12.5, **more: Any
) -> None:
    """Write a text with its lower left corner at (x, y), as shares of width and height."""
    place: dict[str, Any] = {"xref": "paper", "yref": "paper", "xanchor": "left"}
    place |= {"yanchor": "bottom", "align": "left"} | more
    fig.add_annotation(
        text=text, x=x, y=y, showarrow=False, font={"size": size, "color": colour}, **place
    )


def faded(colour: str, alpha: float) -> str:
    """Return the colour `#rrggbb` as rgba with the given opacity."""
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:7], 16)},{alpha})"
