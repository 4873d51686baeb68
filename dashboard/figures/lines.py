"""Lines over steps: a few panels on one time axis, each with its unit and a legend beside it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.data.timeline_marks import Mark
from geodiag.dashboard.figures.curve import draw_curve
from geodiag.dashboard.figures.event_marks import draw_marks
from geodiag.dashboard.figures.style import (
    Theme,
    axis,
    axis_number,
    base,
    empty,
    ticks_of,
    time_axis,
    titled,
)


class Line(NamedTuple):
    """One series: its label beside the panel, and its values (see `dashboard.data.grid`)."""

    label: str
    step_S: np.ndarray
    value_S: np.ndarray


class Strip(NamedTuple):
    """One panel of lines that share a unit."""

    title: str
    lines: Sequence[Line]
    unit: str = ""


_GAP_PX = 18
_STRIP_PX = 118


def over_steps(
    strips: Sequence[Strip],
    theme: Theme,
    window: tuple[int, int] | None = None,
    *,
    marks: Sequence[Mark] = (),
    step_extent: tuple[int, int] | None = None,
    nothing: str = "Not recorded in this run.",
) -> go.Figure:
    """Draw panels of lines. Series without any value and panels without series are left out.

    `step_extent` is the range of the time axis if there is no window.
    """
    shown = _with_values(strips, window)
    if not shown:
        return empty(nothing, theme, 160)
    plot_px = _STRIP_PX * len(shown) + _GAP_PX * (len(shown) - 1)
    fig = base(theme, plot_px + 70, hovermode="x unified", hoversubplots="axis")
    top = 1.0
    for i, strip in enumerate(shown, 1):
        _draw_strip(fig, strip, i, (max(0.0, top - _STRIP_PX / plot_px), top), theme)
        top -= (_STRIP_PX + _GAP_PX) / plot_px
    reach = window or ((step_extent[0] - 0.5, step_extent[1] + 0.5) if step_extent else None)
    fig.update_layout(
        xaxis=time_axis(theme, reach, anchor=f"y{axis_number(len(shown))}"),
        margin={"t": 22},  # room for the buttons above the legend
    )
    draw_marks(fig, marks, window or (-np.inf, np.inf), theme)
    return fig


def _with_values(strips: Sequence[Strip], window: tuple[int, int] | None) -> list[Strip]:
    """The strips in a window, without lines that have no values and without empty strips."""
    cut = [s._replace(lines=[_cut(line, window) for line in s.lines]) for s in strips]
    filled = [
        s._replace(lines=[line for line in s.lines if not np.isnan(line.value_S).all()])
        for s in cut
    ]
    return [s for s in filled if s.lines]


def _draw_strip(
    fig: go.Figure, strip: Strip, i: int, domain: tuple[float, float], theme: Theme
) -> None:
    """Draw the axis, the lines and the legend of strip number `i`."""
    n = axis_number(i)
    # The axis of a rate that is always 0 must not extend below 0.
    below = any((line.value_S < 0).any() for line in strip.lines)
    kind: dict[str, Any] = {"domain": domain, "anchor": "x", "nticks": 5}
    kind |= {"rangemode": "normal" if below else "nonnegative"}
    kind |= {"tickformat": ticks_of(strip.unit)} if strip.unit == "share" else {}
    fig.update_layout({f"yaxis{n}": axis(theme, titled(strip.title, strip.unit), **kind)})
    names = []
    for line, colour in zip(strip.lines, theme.series, strict=False):
        style: Any = {"y": f"y{n}", "colour": colour, "unit": strip.unit}
        draw_curve(fig, line.step_S, line.value_S, theme, name=line.label, **style)
        names.append(f'<span style="color:{colour}">━ {line.label}</span>')
    fig.add_annotation(
        text="<br>".join(names),
        x=1.005,
        y=domain[1],
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="top",
        align="left",
        showarrow=False,
        font={"size": 11},
    )


def _cut(line: Line, window: tuple[int, int] | None) -> Line:
    if window is None:
        return line
    inside = (line.step_S >= window[0] - 1) & (line.step_S <= window[1] + 1)
    return Line(line.label, line.step_S[inside], line.value_S[inside])
