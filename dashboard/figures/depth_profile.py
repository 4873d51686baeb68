"""The values of every site at one step, over depth: forward and backward gain."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.data.grid import Grid, row_name
from geodiag.dashboard.figures.colour_scale import is_gain
from geodiag.dashboard.figures.style import Theme, axis, base, empty, legend_above, titled


class Curve(NamedTuple):
    """One line of the profile: its label, its grid, and the value of each row."""

    label: str
    grid: Grid
    value_R: np.ndarray


def profile(
    curves: Sequence[Curve], theme: Theme, row: str | None = None, height: int = 310
) -> go.Figure:
    """Draw the curves with layer 0 on top; a dotted line marks a gain of 1."""
    curves = [c for c in curves if np.isfinite(c.value_R).any()]
    if not curves:
        return empty("No value at this step.", theme, height)
    names = [row_name(r) for r in curves[0].grid.rows]
    values = np.concatenate([c.value_R[np.isfinite(c.value_R)] for c in curves])
    wide = bool((values > 0).all()) and values.max() / values.min() > 20
    metric = curves[0].grid.metric
    fig = base(theme, height, hovermode="y unified")
    title = titled("", metric.unit).strip(", ") or "value"
    fig.update_layout(
        xaxis=axis(theme, title, type="log" if wide else "linear", nticks=6),
        yaxis=_depth_axis(names, theme),
        margin={"l": 64, "r": 16, "t": 36, "b": 42},
        showlegend=True,
        legend=legend_above(theme),
    )
    _draw_curves(fig, curves, names, theme)
    if is_gain(metric):
        fig.add_vline(x=1, line={"color": theme.cursor, "width": 1, "dash": "dot"})
        if not wide:
            fig.update_xaxes(range=_range_with_one(values))
    if row in names:
        at = names.index(row)
        band = {"fillcolor": theme.line, "opacity": 0.6, "line_width": 0, "layer": "below"}
        fig.add_hrect(y0=at - 0.5, y1=at + 0.5, **band)
    return fig


def _depth_axis(names: list[str], theme: Theme) -> dict[str, Any]:
    """The sites from top to bottom, at most 16 of them with a label."""
    rows: dict[str, Any] = {"type": "category", "autorange": "reversed"}
    rows |= {"categoryorder": "array", "categoryarray": names}
    return axis(theme, tickvals=names[:: max(1, -(-len(names) // 16))], **rows)


def _draw_curves(fig: go.Figure, curves: Sequence[Curve], names: list[str], theme: Theme) -> None:
    styles = ((theme.forward, "circle"), (theme.backward, "diamond"))
    for curve, (colour, symbol) in zip(curves, styles, strict=False):
        fig.add_scatter(
            x=np.where(np.isfinite(curve.value_R), curve.value_R, np.nan),
            y=names,
            mode="lines+markers",
            name=curve.label,
            line={"color": colour, "width": 1.6},
            marker={"size": 6 if len(names) <= 24 else 4, "symbol": symbol},
            hovertemplate="%{x:.5g}",
        )


def _range_with_one(values: np.ndarray) -> list[float]:
    """The range of the values and of 1, with a margin."""
    low = min(1.0, float(values.min()))
    high = max(1.0, float(values.max()))
    pad = max(0.01, 0.08 * (high - low))
    return [low - pad, high + pad]
