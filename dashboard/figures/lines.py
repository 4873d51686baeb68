"""Lines over steps: a few panels on one time axis, each with its unit and a legend beside it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.data.timeline_marks import Mark
from geodiag.dashboard.figures.curve import draw_curve
from geodiag.dashboard.figures.event_marks import draw_marks
from geodiag.dashboard.figures.style import Theme, axis, base, empty, ticks_of, time_axis, titled


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
    shown = [s._replace(lines=[_cut(n, window) for n in s.lines]) for s in strips]
    shown = [s._replace(lines=[n for n in s.lines if not np.isnan(n.value_S).all()]) for s in shown]
    shown = [s for s in shown if s.lines]
    if not shown:
        return empty(nothing, theme, 160)
    inner = _STRIP_PX * len(shown) + _GAP_PX * (len(shown) - 1)
    fig = base(theme, inner + 70, hovermode="x unified", hoversubplots="axis")
    top = 1.0
    for i, strip in enumerate(shown, 1):
        n = "" if i == 1 else str(i)
        domain = [max(0.0, top - _STRIP_PX / inner), top]
        # The axis of a rate that is always 0 must not extend below 0.
        below = any((line.value_S < 0).any() for line in strip.lines)
        mode = "normal" if below else "nonnegative"
        kind = {"domain": domain, "anchor": "x", "nticks": 5, "rangemode": mode}
        kind |= {"tickformat": ticks_of(strip.unit)} if strip.unit == "share" else {}
        fig.update_layout({f"yaxis{n}": axis(theme, titled(strip.title, strip.unit), **kind)})
        for line, colour in zip(strip.lines, theme.series, strict=False):
            draw_curve(
                fig,
                line.step_S,
                line.value_S,
                theme,
                name=line.label,
                y=f"y{n}",
                colour=colour,
                unit=strip.unit,
            )
        names = [
            f'<span style="color:{c}">━ {x.label}</span>'
            for x, c in zip(strip.lines, theme.series, strict=False)
        ]
        fig.add_annotation(
            text="<br>".join(names),
            x=1.005,
            y=top,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="top",
            align="left",
            showarrow=False,
            font={"size": 11},
        )
        top -= (_STRIP_PX + _GAP_PX) / inner
    reach = window or ((step_extent[0] - 0.5, step_extent[1] + 0.5) if step_extent else None)
    fig.update_layout(margin={"t": 22})  # room for the buttons above the legend
    fig.update_layout(
        xaxis=time_axis(theme, reach, anchor=f"y{'' if len(shown) == 1 else len(shown)}")
    )
    draw_marks(fig, marks, window or (-np.inf, np.inf), theme)
    return fig


def _cut(line: Line, window: tuple[int, int] | None) -> Line:
    if window is None:
        return line
    inside = (line.step_S >= window[0] - 1) & (line.step_S <= window[1] + 1)
    return Line(line.label, line.step_S[inside], line.value_S[inside])
