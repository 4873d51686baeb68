"""Small multiples: one strip per series on one time axis, with its usual range as a band."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.figures.curve import draw_curve
from geodiag.dashboard.figures.style import (
    Theme,
    add_text,
    axis,
    axis_number,
    base,
    empty,
    faded,
    ticks_of,
    time_axis,
    upright,
)


class Strip(NamedTuple):
    """One series: its name, a note beside the name, its values, and its usual range."""

    name: str
    note: str
    step_S: np.ndarray
    value_S: np.ndarray
    usual: tuple[float, float] | None
    unit: str = ""


_STRIP_PX = 52
_TITLE_PX = 27
_FEW = 24
"""Series with fewer samples also get dots, because a line alone hides how few they are."""


def small_multiples(
    strips: Sequence[Strip], theme: Theme, window: tuple[int, int], cursor: int | None, nothing: str
) -> go.Figure:
    """Draw the strips from top to bottom, with a dotted line at step `cursor`."""
    low, high = window
    shown = [
        s for s in strips if ((s.step_S >= low) & (s.step_S <= high) & ~np.isnan(s.value_S)).any()
    ]
    if not shown:
        return empty(nothing, theme, 120)
    plot_px = len(shown) * (_STRIP_PX + _TITLE_PX)
    fig = base(theme, plot_px + 34, hovermode="x unified", hoversubplots="axis")
    top = 1.0
    for i, strip in enumerate(shown, 1):
        top -= _TITLE_PX / plot_px
        domain = (max(0.0, top - _STRIP_PX / plot_px), top)
        _draw_frame(fig, strip, axis_number(i), domain, theme)
        if cursor is not None:
            fig.add_shape(upright(cursor, theme.ink, "dot", domain))
        inside = (strip.step_S >= low - 1) & (strip.step_S <= high + 1)
        style: Any = {"y": f"y{axis_number(i)}", "unit": strip.unit, "few": _FEW}
        draw_curve(
            fig, strip.step_S[inside], strip.value_S[inside], theme, name=strip.name, **style
        )
        top = domain[0]
    reach = (low - 0.5, high + 0.5)
    fig.update_layout(
        xaxis=time_axis(theme, reach, "", anchor=f"y{axis_number(len(shown))}", nticks=5),
        margin={"l": 48, "r": 10, "t": 2, "b": 30},
    )
    return fig


def _draw_frame(
    fig: go.Figure, strip: Strip, n: str, domain: tuple[float, float], theme: Theme
) -> None:
    """Draw the axis, the title and the usual range of a strip."""
    ticks: dict[str, Any] = {"nticks": 3, "tickformat": ticks_of(strip.unit)}
    fig.update_layout({f"yaxis{n}": axis(theme, domain=domain, anchor="x", **ticks)})
    title = f'<b>{strip.name}</b>  <span style="color:{theme.soft}">{strip.note}</span>'
    add_text(fig, title, 0, domain[1], theme.ink, 11.5, xshift=-40, yshift=3, align="center")
    if strip.usual is not None:
        fig.add_shape(
            type="rect",
            x0=0,
            x1=1,
            xref="x domain",
            y0=strip.usual[0],
            y1=strip.usual[1],
            yref=f"y{n}",
            fillcolor=faded(theme.on, 0.16),
            line_width=0,
            layer="below",
        )
