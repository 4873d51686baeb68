"""The timeline of the overview: loss with events, gradient norm, stage scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.data.grid import Grid
from geodiag.dashboard.data.step_table import SupersededSteps
from geodiag.dashboard.data.timeline_marks import Mark, RoutingSpan, SpikeMark
from geodiag.dashboard.figures.colour_scale import robust_z, z_shade
from geodiag.dashboard.figures.curve import draw_curve
from geodiag.dashboard.figures.event_marks import draw_marks, draw_superseded, routing_colour
from geodiag.dashboard.figures.style import (
    FEW_STEPS,
    Theme,
    add_text,
    axis,
    base,
    empty,
    faded,
    time_axis,
    titled,
    upright,
)
from geodiag.dashboard.figures.time_bins import binned
from geodiag.metrics.schema import METRICS

# S steps.

STAGES = ("1 curvature", "2 routing", "3 amplification")
"""Short names of the stages, for axes."""
_DOMAINS = {"loss": (0.5, 1.0), "grad_norm": (0.25, 0.44), "stages": (0.0, 0.19)}
_MOST_BANDS = 80


def timeline(
    steps: dict[str, np.ndarray],
    spikes: Sequence[SpikeMark],
    spans: Sequence[RoutingSpan],
    theme: Theme,
    window: tuple[int, int] | None = None,
    step: int | None = None,
    log: bool = False,
    marks: Sequence[Mark] = (),
    superseded: Sequence[SupersededSteps] = (),
    height: int = 640,
) -> go.Figure:
    """Draw the timeline.

    `steps` is table `steps` by column, `window` the visible range; a dotted line marks `step`.
    Steps that later attempts replaced (`superseded`) are faint lines.
    """
    if not len(steps["step"]):
        return empty("Waiting for the first step.", theme, height)
    low, high = window or (int(steps["step"][0]), int(steps["step"][-1]))
    reach: tuple[float, float] | None = window or (
        (low - 0.5, high + 0.5) if high - low < FEW_STEPS else None
    )
    near = (steps["step"] >= low - 1) & (steps["step"] <= high + 1)
    seen = {k: v[near] for k, v in steps.items()}
    fig = base(theme, height, hovermode="x unified", hoversubplots="axis")
    _layout_axes(fig, reach, log, theme)
    _draw_bands(fig, [s for s in spans if s.end >= low and s.start <= high], low, high, theme)
    draw_superseded(fig, superseded, low, high, theme, {"loss": "y", "grad_norm": "y2"})
    for name, y in (("loss", "y"), ("grad_norm", "y2")):
        draw_curve(fig, seen["step"], seen[name], theme, name=name.replace("_", " "), y=y)
    _draw_stages(fig, seen, theme)
    inside = [s for s in spikes if s.onset <= high and (s.end or s.peak or s.detected) >= low]
    _draw_spike_bars(fig, inside, theme)
    _draw_spikes(fig, seen, inside, superseded, theme)
    draw_marks(fig, marks, (low, high), theme)
    if step is not None:
        fig.add_shape(upright(step, theme.ink, "dot"))
    return fig


def _layout_axes(
    fig: go.Figure, reach: tuple[float, float] | None, log: bool, theme: Theme
) -> None:
    cursor: dict[str, Any] = {"showspikes": True, "spikemode": "across", "spikethickness": 1}
    cursor |= {"spikecolor": theme.cursor, "spikedash": "dot"}
    rows: dict[str, Any] = {"autorange": "reversed", "showgrid": False, "ticks": ""}
    fig.update_layout(
        xaxis=time_axis(theme, reach, anchor="y3", **cursor),
        yaxis=axis(theme, _title("loss"), domain=_DOMAINS["loss"], type="log" if log else "linear"),
        yaxis2=axis(theme, _title("grad_norm"), domain=_DOMAINS["grad_norm"], rangemode="tozero"),
        yaxis3=axis(theme, domain=_DOMAINS["stages"], **rows),
    )


def _title(name: str) -> str:
    metric = METRICS["steps", name]
    return titled({"grad_norm": "grad norm"}.get(name, name), metric.unit)


def _draw_stages(fig: go.Figure, seen: dict[str, np.ndarray], theme: Theme) -> None:
    names = [f"stage{i}_score" for i in (1, 2, 3)]
    values = np.stack([seen[n] for n in names])
    columns = binned(
        Grid(METRICS["steps", names[0]], ((0, 0), (1, 0), (2, 0)), seen["step"], values)
    )
    fig.update_layout(
        yaxis3={"tickvals": [0, 1, 2], "ticktext": list(STAGES)}, coloraxis=robust_z(theme, 0.19)
    )
    if not len(columns.left_B):
        fig.add_scatter(x=[None], y=[None], yaxis="y3", hoverinfo="skip")  # keeps the axis
        fig.update_layout(
            yaxis3={"autorange": False, "range": [2.5, -0.5]}, coloraxis={"showscale": False}
        )
        middle = sum(_DOMAINS["stages"]) / 2
        anchors = {"xanchor": "auto", "yanchor": "auto", "align": "center"}
        add_text(fig, "No stage scores in this range.", 0.5, middle, theme.soft, 13, **anchors)
        return
    fig.add_heatmap(
        z=z_shade(columns.values_RB),
        customdata=columns.values_RB,
        x0=float(columns.left_B[0]) + (columns.width - 1) / 2,
        dx=columns.width,
        y=[0, 1, 2],
        yaxis="y3",
        coloraxis="coloraxis",
        ygap=3,
        name="stage",
        hovertemplate="%{customdata:.1f} robust z<extra>stage %{y}</extra>",
        hoverongaps=False,
    )


def _draw_bands(
    fig: go.Figure, spans: Sequence[RoutingSpan], low: int, high: int, theme: Theme
) -> None:
    wide = max((high - low) / 14, 1)
    for span in spans[-_MOST_BANDS:]:
        colour = routing_colour(span.mode, theme)
        fig.add_shape(
            type="rect",
            x0=span.start - 0.5,
            x1=span.end + 0.5,
            y0=_DOMAINS["grad_norm"][0],
            y1=1,
            yref="paper",
            fillcolor=faded(colour, 0.14),
            line_width=0,
            layer="below",
        )
        start = max(span.start, low)
        end = min(span.end, high)
        if span.mode == "on" and end - start > wide:
            fig.add_annotation(
                x=(start + end) / 2,
                y=0.982,
                yref="paper",
                yanchor="top",
                text="anticipatory routing on",
                showarrow=False,
                font={"size": 11, "color": theme.on},
            )


def _draw_spike_bars(fig: go.Figure, spikes: Sequence[SpikeMark], theme: Theme) -> None:
    """Draw a bar from onset to end, at the top because routing bands tint the background."""
    for spike in spikes[-_MOST_BANDS:]:
        end = spike.end or spike.peak
        if end:
            fig.add_shape(
                type="rect",
                x0=spike.onset,
                x1=end,
                y0=0.988,
                y1=1,
                yref="paper",
                fillcolor=theme.spike,
                opacity=0.75,
                line_width=0,
            )


def _draw_spikes(
    fig: go.Figure,
    seen: dict[str, np.ndarray],
    spikes: Sequence[SpikeMark],
    superseded: Sequence[SupersededSteps],
    theme: Theme,
) -> None:
    """Draw a ring at each onset, with a hover text about the spike, and a diamond at its peak."""
    texts = {"hovertemplate": "%{text}<extra></extra>"}
    silent = {"hoverinfo": "skip"}
    for name, symbol, size, hover in (
        ("onset", "circle-open", 12, texts),
        ("peak", "diamond", 9, silent),
    ):
        known = [(getattr(s, name), s) for s in spikes if getattr(s, name) is not None]
        if not known:
            continue
        line = {"width": 2, "color": theme.spike}
        fig.add_scatter(
            x=[step for step, _ in known],
            y=[loss_at(seen, superseded, s.attempt, step) for step, s in known],
            mode="markers",
            marker={"symbol": symbol, "size": size, "color": theme.spike, "line": line},
            name=f"spike {name}",
            text=[_hover_text(s) for _, s in known],
            **hover,
        )


def _hover_text(spike: SpikeMark) -> str:
    parts = [
        f"onset {spike.onset:,}",
        f"peak {spike.peak:,}" if spike.peak else "",
        f"end {spike.end:,}" if spike.end else "",
    ]
    score = f"{spike.score:.1f} robust σ" if spike.score else ""
    return " · ".join(p for p in [spike.kind, *parts, score] if p)


def loss_at(
    seen: dict[str, np.ndarray],
    superseded: Sequence[SupersededSteps],
    attempt: int | None,
    step: int,
) -> float | None:
    """Return the loss at a step in the attempt of a spike, None if it is unknown."""
    for old in superseded:
        if (
            old.attempt == attempt
            and (value := _value_at(old.step_S, old.loss_S, step)) is not None
        ):
            return value
    return _value_at(seen["step"], seen["loss"], step)


def _value_at(step_S: np.ndarray, value_S: np.ndarray, step: int) -> float | None:
    i = int(np.searchsorted(step_S, step))
    known = i < len(step_S) and step_S[i] == step and np.isfinite(value_S[i])
    return float(value_S[i]) if known else None
