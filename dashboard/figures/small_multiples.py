"""Small multiples: one strip per series on one time axis, with its usual range as a band."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.figures.curve import draw_curve
from geodiag.dashboard.figures.style import (
    Theme,
    axis,
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
    inner = len(shown) * (_STRIP_PX + _TITLE_PX)
    fig = base(theme, inner + 34, hovermode="x unified", hoversubplots="axis")
    top = 1.0
    for i, strip in enumerate(shown, 1):
        n = "" if i == 1 else str(i)
        top -= _TITLE_PX / inner
        domain = (max(0.0, top - _STRIP_PX / inner), top)
        fig.update_layout(
            {
                f"yaxis{n}": axis(
                    theme, domain=domain, anchor="x", nticks=3, tickformat=ticks_of(strip.unit)
                )
            }
        )
        fig.add_annotation(
            text=f'<b>{strip.name}</b>  <span style="color:{theme.soft}">{strip.note}</span>',
            x=0,
            y=top,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            yshift=3,
            showarrow=False,
            xshift=-40,
            font={"size": 11.5, "color": theme.ink},
        )
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
        if cursor is not None:
            fig.add_shape(upright(cursor, theme.ink, "dot", domain))
        inside = (strip.step_S >= low - 1) & (strip.step_S <= high + 1)
        step_S, value_S = strip.step_S[inside], strip.value_S[inside]
        draw_curve(
            fig, step_S, value_S, theme, name=strip.name, y=f"y{n}", unit=strip.unit, few=_FEW
        )
        top = domain[0]
    fig.update_layout(
        xaxis=time_axis(
            theme,
            (low - 0.5, high + 0.5),
            "",
            anchor=f"y{'' if len(shown) == 1 else len(shown)}",
            nticks=5,
        ),
        margin={"l": 48, "r": 10, "t": 2, "b": 30},
    )
    return fig
