"""The cascade: the loss above three maps of layers over steps, and the path from the origin to the
loss across them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go

from geodiag.cascade.defence import NAMES
from geodiag.cascade.explain import Cascade, StageMap
from geodiag.dashboard.data.grid import Grid
from geodiag.dashboard.data.step_table import SupersededSteps
from geodiag.dashboard.data.timeline_marks import Mark, RoutingSpan
from geodiag.dashboard.figures.cascade_path import Place, draw_path
from geodiag.dashboard.figures.colour_scale import robust_z, z_shade
from geodiag.dashboard.figures.curve import draw_curve
from geodiag.dashboard.figures.event_marks import draw_marks, draw_superseded
from geodiag.dashboard.figures.style import Theme, axis, base, empty, faded, time_axis
from geodiag.dashboard.figures.time_bins import binned
from geodiag.metrics.schema import METRICS

# S steps, L layers.

STAGES = {
    1: (NAMES[1], "activations of an expert grow extreme"),
    2: (NAMES[2], "tokens go to experts that no longer fit them"),
    3: (NAMES[3], "residual maps and gradients amplify the error over depth"),
}
"""Stage → its name and a short explanation."""
_LOSS_PX, _TITLE_PX, _GAP_PX, _AXIS_PX = 150, 24, 10, 46
_LEAST_PX, _MOST_PX = 96, 190


@dataclass(frozen=True, kw_only=True)
class CascadeScene:
    """Everything that is drawn around a path: what was recorded between two steps."""

    window: tuple[int, int]
    steps: dict[str, np.ndarray]
    """Table `steps`, by column."""
    stages: StageMap
    marks: Sequence[Mark] = ()
    spans: Sequence[RoutingSpan] = ()
    superseded: Sequence[SupersededSteps] = ()
    missing: dict[int, str] = field(default_factory=dict)
    """Stage → why there is nothing to see."""


def cascade_figure(
    scene: CascadeScene,
    theme: Theme,
    cascade: Cascade | None = None,
    cell: tuple[int, int, int] | None = None,
) -> go.Figure:
    """The scene with the path of `cascade` across it; `cell` (stage, layer, step) has a frame.

    The first three traces are the maps of stages 1, 2 and 3.
    """
    low, high = scene.window
    near = (scene.steps["step"] >= low) & (scene.steps["step"] <= high)
    if not near.any():
        return empty("Waiting for the first step.", theme, 420)
    tall, inner = _pixels(len(scene.stages.layers))
    fig = base(theme, height_of(len(scene.stages.layers)), hovermode="closest")
    place = _stack(inner, tall, scene.stages.layers)
    for stage in STAGES:
        _map(fig, scene, stage, place, theme)
    _loss(fig, scene, near, place, theme)
    reach = (low - 0.5, high + 0.5)
    cursor: Any = {"showspikes": True, "spikemode": "across", "spikethickness": 1}
    fig.update_layout(
        xaxis=time_axis(theme, reach, anchor="y4", showgrid=False, **cursor),
        coloraxis=robust_z(theme, length=1 - (_TITLE_PX + _LOSS_PX + _TITLE_PX + _GAP_PX) / inner),
        margin={"l": 58, "r": 76, "t": 2, "b": 42},
    )
    fig.update_layout(xaxis={"spikecolor": theme.cursor, "spikedash": "dot"})
    others = [
        m
        for m in scene.marks
        if cascade is None or m.kind != "spike" or m.step != cascade.spike_onset
    ]
    draw_marks(fig, others, reach, theme, place.domains)
    if cascade is not None:
        asked = "early warning" if _warned(scene, cascade.spike_onset) else "the step in question"
        draw_path(fig, cascade, place, reach, theme, _loss_at(scene, cascade.spike_onset), asked)
    if cell is not None:
        _frame(fig, cell, scene, theme)
    return fig


def height_of(layers: int) -> int:
    """Pixels of the picture of a model of so many layers."""
    return round(_pixels(layers)[1] + _AXIS_PX)


def _pixels(layers: int) -> tuple[float, float]:
    """Heights of one map, and of everything above the time axis."""
    tall = min(_MOST_PX, max(_LEAST_PX, 6.0 * layers))
    return tall, _TITLE_PX + _LOSS_PX + 3 * (_TITLE_PX + tall + _GAP_PX)


def _stack(inner: float, tall: float, layers: np.ndarray) -> Place:
    """Where each panel stands, the loss on top."""
    top = 1 - _TITLE_PX / inner
    domains = [(top - _LOSS_PX / inner, top)]
    for _ in STAGES:
        top = domains[-1][0] - (_GAP_PX + _TITLE_PX) / inner
        domains.append((max(0.0, top - tall / inner), top))
    return Place(tuple(domains), layers.tolist(), inner)


def _loss(
    fig: go.Figure, scene: CascadeScene, near: np.ndarray, place: Place, theme: Theme
) -> None:
    low, high = scene.window
    loss_S = scene.steps["loss"][near]
    finite = loss_S[np.isfinite(loss_S)]
    a, b = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    pad = max(0.08 * (b - a), 1e-3)
    place.loss_range = (a - pad, b + 1.6 * pad)
    unit = METRICS["steps", "loss"].unit
    fig.update_layout(
        yaxis=axis(theme, domain=place.domains[0], range=place.loss_range, nticks=5, anchor="x")
    )
    _title(fig, place, 0, f"<b>loss</b>  {_soft(unit, theme)}", theme)
    for span in scene.spans:
        if span.end >= low and span.start <= high:
            colour = {"warmup": theme.warmup, "on": theme.on, "drain": theme.drain}[span.mode]
            fig.add_shape(
                type="rect", x0=max(span.start, low) - 0.5, x1=min(span.end, high) + 0.5, y0=0, y1=1,
                yref="y domain", fillcolor=faded(colour, 0.13), line_width=0, layer="below",
            )  # fmt: skip
            if span.mode == "on" and min(span.end, high) - max(span.start, low) > (high - low) / 8:
                fig.add_annotation(
                    x=(max(span.start, low) + min(span.end, high)) / 2, y=1, yref="y domain", yanchor="top",
                    text="anticipatory routing on", showarrow=False, font={"size": 11, "color": theme.on},
                )  # fmt: skip
    draw_superseded(fig, scene.superseded, low, high, theme, {"loss": "y"})
    hover = "loss %{y:.4g} at step %{x:,d}"
    draw_curve(
        fig,
        scene.steps["step"][near],
        loss_S,
        theme,
        name="loss",
        hover=hover,
        extra="<extra></extra>",
    )


def _map(fig: go.Figure, scene: CascadeScene, stage: int, place: Place, theme: Theme) -> None:
    name, what = STAGES[stage]
    _title(fig, place, stage, f"<b>{stage} · {name}</b>  {_soft(what, theme)}", theme)
    names = [str(k) for k in place.layers]
    rows = tuple((int(k), 1) for k in place.layers)
    score_LS = scene.stages.scores[stage - 1]
    columns = binned(
        Grid(METRICS["steps", f"stage{stage}_score"], rows, scene.stages.steps, score_LS)
    )
    seen = len(columns.left_B) > 0
    kind: dict[str, Any] = {
        "range": [0, 1],
        "tickvals": [],
    }  # categories that nothing is drawn at would be none
    if seen:
        kind = {"type": "category", "categoryorder": "array", "categoryarray": names}
        kind |= {
            "range": [len(names) - 0.5, -0.5],
            "tickvals": names[:: max(1, -(-len(names) // 8))],
        }
    shape = {
        "domain": place.domains[stage],
        "autorange": False,
        "anchor": "x",
        "showgrid": False,
        "ticks": "",
    }
    fig.update_layout({f"yaxis{stage + 1}": axis(theme, "layer", **shape, **kind)})
    if not seen:
        fig.add_annotation(
            text=scene.missing.get(stage, "Nothing of this stage was recorded here."), x=0.5, xref="paper",
            y=sum(place.domains[stage]) / 2, yref="paper", showarrow=False, font={"size": 13, "color": theme.soft},
        )  # fmt: skip
        fig.add_scatter(
            x=[None], y=[None], yaxis=f"y{stage + 1}", hoverinfo="skip"
        )  # keeps the axis, and its turn
        return
    fig.add_heatmap(
        z=z_shade(columns.values_RB), customdata=columns.values_RB, dx=columns.width,
        x0=float(columns.left_B[0]) + (columns.width - 1) / 2, y=names, yaxis=f"y{stage + 1}", coloraxis="coloraxis",
        hoverongaps=False, name=f"stage {stage}",
        hovertemplate=f"<b>layer %{{y}}</b> · step %{{x:,.0f}}<br>{name} %{{customdata:.1f}} robust z<extra></extra>",
    )  # fmt: skip


def _title(fig: go.Figure, place: Place, panel: int, text: str, theme: Theme) -> None:
    fig.add_annotation(
        text=text, x=0, y=place.domains[panel][1], xref="paper", yref="paper", xanchor="left", yanchor="bottom",
        showarrow=False, font={"size": 12.5, "color": theme.ink}, yshift=2, align="left",
        bgcolor=theme.paper,  # the path passes behind the words
    )  # fmt: skip


def _soft(text: str, theme: Theme) -> str:
    return f'<span style="color:{theme.soft}">{text}</span>'


def _warned(scene: CascadeScene, step: int) -> bool:
    return any(m.kind == "early_warning" and m.step == step for m in scene.marks)


def _loss_at(scene: CascadeScene, step: int) -> float | None:
    i = int(np.searchsorted(scene.steps["step"], step))
    known = i < len(scene.steps["step"]) and np.isfinite(scene.steps["loss"][i])
    return float(scene.steps["loss"][i]) if known else None


def _frame(fig: go.Figure, cell: tuple[int, int, int], scene: CascadeScene, theme: Theme) -> None:
    stage, layer, step = cell
    layers = scene.stages.layers.tolist()
    if layer not in layers or not scene.window[0] <= step <= scene.window[1]:
        return
    at, half = layers.index(layer), max(0.5, (scene.window[1] - scene.window[0]) / 220)
    for colour, width in (
        (theme.paper, 4.5),
        (theme.ink, 1.8),
    ):  # to be seen on the palest and on the deepest cell
        fig.add_shape(
            type="rect", x0=step - half, x1=step + half, y0=at - 0.5, y1=at + 0.5, yref=f"y{stage + 1}",
            line={"color": colour, "width": width},
        )  # fmt: skip
