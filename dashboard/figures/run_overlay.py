"""Several runs on one axis: one panel per metric, one line per run.

Runs differ in colour, from the fifth on also in the dashes of their lines.
"""

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.figures.curve import draw_curve
from geodiag.dashboard.figures.style import (
    Theme,
    axis,
    axis_number,
    base,
    empty,
    legend_above,
    time_axis,
    titled,
)

# S steps.

DASHES = ("solid", "dash", "dot")
_TOP_PX = 14
_LINE_PX = 20
_GAP_PX = 20
_AXIS_PX = 46
_LETTER_PX, _LEGEND_PX = 7, 560
"""Width of a character in the legend, and of a row of the legend in the narrowest window."""


class Ring(NamedTuple):
    """A spike: the step and loss of its onset, and its hover text."""

    step: int
    value: float | None
    text: str


class Track(NamedTuple):
    """One run: its label, its steps, the position of each step on the axis, its spikes."""

    label: str
    step_S: np.ndarray
    x_S: np.ndarray
    rings: Sequence[Ring] = ()


class Panel(NamedTuple):
    """One metric of every run, in the order of the tracks."""

    title: str
    unit: str
    values: Sequence[np.ndarray]
    pixels: int
    floor: float | None = None
    """Lower end of a logarithmic axis of scores; smaller values are drawn there."""
    alert: float | None = None
    """Position of a dotted line: scores above it are not noise."""


def stroke(i: int, theme: Theme) -> tuple[str, str]:
    """Return colour and dash of run number `i`."""
    return theme.series[i % len(theme.series)], DASHES[i // len(theme.series) % len(DASHES)]


def overlay(
    tracks: Sequence[Track], panels: Sequence[Panel], theme: Theme, of: str = "step"
) -> go.Figure:
    """Draw the panels from top to bottom; rings mark spikes in the first one.

    `of` is the unit of the axis: `step` or `tokens`.
    """
    panels = [p for p in panels if any(np.isfinite(v).any() for v in p.values)]
    if not panels:
        return empty("Not recorded in any of these runs.", theme, 160)
    plot_px = sum(p.pixels for p in panels) + _GAP_PX * (len(panels) - 1)
    legend_rows = -(-sum(_LETTER_PX * len(t.label) + 48 for t in tracks) // _LEGEND_PX)
    above = _TOP_PX + _LINE_PX * legend_rows
    fig = base(theme, plot_px + above + _AXIS_PX, hovermode="x unified", hoversubplots="axis")
    top = 1.0
    for i, panel in enumerate(panels, 1):
        domain = (max(0.0, top - panel.pixels / plot_px), top)
        _draw_panel(fig, tracks, panel, axis_number(i), domain, theme)
        top = domain[0] - _GAP_PX / plot_px
    for k, track in enumerate(tracks):
        _draw_rings(fig, track, k, theme)
    fig.update_layout(
        xaxis=_common_axis(tracks, len(panels), of, theme),
        margin={"l": 70, "r": 20, "t": above, "b": 42},
        showlegend=True,
        legend=legend_above(theme),
    )
    return fig


def _draw_panel(
    fig: go.Figure,
    tracks: Sequence[Track],
    panel: Panel,
    n: str,
    domain: tuple[float, float],
    theme: Theme,
) -> None:
    """Draw the axis, the lines of all runs and the alert level of a panel."""
    fig.update_layout({f"yaxis{n}": _height(panel, domain, theme)})
    for k, (track, value_S) in enumerate(zip(tracks, panel.values, strict=True)):
        _draw_line(fig, track, panel, value_S, k, n, theme)
    if panel.alert is not None:
        fig.add_shape(
            type="line",
            x0=0,
            x1=1,
            xref="x domain",
            y0=panel.alert,
            y1=panel.alert,
            yref=f"y{n}",
            line={"color": theme.spike, "width": 1, "dash": "dot"},
        )


def _common_axis(tracks: Sequence[Track], panels: int, of: str, theme: Theme) -> dict:
    """The axis of steps or tokens, from the first to the last one of all runs."""
    ends = [float(x) for t in tracks for x in (*t.x_S[:1], *t.x_S[-1:])]
    pad = 0.5 if of == "step" else 0.0
    kind: dict[str, Any] = {"anchor": f"y{axis_number(panels)}"}
    if of != "step":
        hover = {"text": f"%{{x:.4s}} {of}"}
        kind |= {"tickformat": ".3~s", "unifiedhovertitle": hover, "dtick": None}
    return time_axis(theme, (min(ends) - pad, max(ends) + pad), of, **kind)


def _height(panel: Panel, domain: tuple[float, float], theme: Theme) -> dict:
    kind: dict = {"domain": domain, "anchor": "x", "nticks": 5}
    if panel.floor is None:
        return axis(theme, titled(panel.title, panel.unit), **kind)
    finite = [float(v[np.isfinite(v)].max()) for v in panel.values if np.isfinite(v).any()]
    reach = max(*finite, 2 * (panel.alert or panel.floor), 2 * panel.floor)
    ticks = [3.0 * 2**i for i in range(20)]  # the same ticks as on other axes of robust z
    kind |= {"type": "log", "range": [float(np.log10(panel.floor)), float(np.log10(1.15 * reach))]}
    return axis(
        theme,
        titled(panel.title, panel.unit),
        **kind | {"tickvals": ticks[: int(np.log2(reach / 3)) + 1]},
    )


def _draw_line(
    fig: go.Figure, track: Track, panel: Panel, value_S: np.ndarray, k: int, n: str, theme: Theme
) -> None:
    """Downsample by steps, then move each point to its position on the axis."""
    colour, dash = stroke(k, theme)
    before = len(fig.data)
    shown_S = value_S if panel.floor is None else np.maximum(value_S, panel.floor)  # NaN stays NaN
    hover = f"{panel.title} %{{y:.4g}}"
    draw_curve(
        fig,
        track.step_S,
        shown_S,
        theme,
        name=escape(track.label),
        y=f"y{n}",
        colour=colour,
        hover=hover,
    )
    for j, trace in enumerate(fig.data[before:]):
        trace.update(legendgroup=str(k), showlegend=n == "" and j == 0)
        if j == 0:
            trace.update(line_dash=dash, line_width=1.5)
        else:
            trace.update(marker_color=colour)
        if track.x_S is not track.step_S and len(trace.x):
            trace.update(x=np.interp(np.asarray(trace.x, float), track.step_S, track.x_S))


def _draw_rings(fig: go.Figure, track: Track, k: int, theme: Theme) -> None:
    known = [r for r in track.rings if r.value is not None]
    if not known:
        return
    colour, _ = stroke(k, theme)
    fig.add_scatter(
        x=np.interp([r.step for r in known], track.step_S, track.x_S),
        y=[r.value for r in known],
        mode="markers",
        marker={
            "symbol": "circle-open",
            "size": 13,
            "color": colour,
            "line": {"width": 2.4, "color": colour},
        },
        name=escape(track.label),
        legendgroup=str(k),
        showlegend=False,
        text=[escape(r.text) for r in known],
        hovertemplate="%{text}<extra></extra>",
    )
