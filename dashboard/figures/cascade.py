"""The cascade figure: the loss above three maps of layers over steps, and the path of a cascade.

Panel 0 is the loss, panels 1 to 3 are the stages. The path leads from the origin through the first
onset of each later stage to the loss.
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
from geodiag.dashboard.figures.cascade_path import PanelLayout, draw_path
from geodiag.dashboard.figures.colour_scale import robust_z, z_shade
from geodiag.dashboard.figures.curve import draw_curve
from geodiag.dashboard.figures.event_marks import draw_marks, draw_superseded, routing_colour
from geodiag.dashboard.figures.style import Theme, add_text, axis, base, empty, faded, time_axis
from geodiag.dashboard.figures.time_bins import binned
from geodiag.metrics.schema import METRICS

# S steps, L layers.

STAGES = {
    1: (NAMES[1], "activations of an expert grow extreme"),
    2: (NAMES[2], "tokens go to experts that no longer fit them"),
    3: (NAMES[3], "residual maps and gradients amplify the error over depth"),
}
"""Stage → its name and a short explanation."""
_LOSS_PX = 150
_TITLE_PX = 24
_GAP_PX = 10
_AXIS_PX = 46
_LEAST_PX, _MOST_PX = 96, 190
"""Smallest and largest height of the map of one stage."""


@dataclass(frozen=True, kw_only=True)
class CascadeScene:
    """The data of the cascade figure between two steps, without the path."""

    window: tuple[int, int]
    steps: dict[str, np.ndarray]
    """Table `steps`, by column."""
    stages: StageMap
    marks: Sequence[Mark] = ()
    spans: Sequence[RoutingSpan] = ()
    superseded: Sequence[SupersededSteps] = ()
    missing: dict[int, str] = field(default_factory=dict)
    """Stage → why there are no scores."""

    @property
    def in_window(self) -> np.ndarray:
        """Mask of the rows of `steps` that are in the window."""
        low, high = self.window
        return (self.steps["step"] >= low) & (self.steps["step"] <= high)

    def loss_at(self, step: int) -> float | None:
        """Return the loss at a step, None if it is unknown or not finite."""
        i = int(np.searchsorted(self.steps["step"], step))
        known = i < len(self.steps["step"]) and np.isfinite(self.steps["loss"][i])
        return float(self.steps["loss"][i]) if known else None

    def warned_at(self, step: int) -> bool:
        """True if there is an early warning at a step."""
        return any(m.kind == "early_warning" and m.step == step for m in self.marks)


def cascade_figure(
    scene: CascadeScene,
    theme: Theme,
    cascade: Cascade | None = None,
    cell: tuple[int, int, int] | None = None,
) -> go.Figure:
    """Draw the scene with the path of `cascade`; a frame marks `cell` (stage, layer, step).

    The first three traces are the maps of stages 1, 2 and 3.
    """
    if not scene.in_window.any():
        return empty("Waiting for the first step.", theme, 420)
    fig = base(theme, height_of(len(scene.stages.layers)), hovermode="closest")
    panels = _panels(scene.stages.layers)
    for stage in STAGES:
        _draw_stage(fig, scene, stage, panels, theme)
    _draw_loss(fig, scene, panels, theme)
    _layout_axes(fig, scene, panels, theme)
    reach = _reach(scene)
    own_spike = cascade.spike_onset if cascade is not None else None
    others = [m for m in scene.marks if (m.kind, m.step) != ("spike", own_spike)]
    draw_marks(fig, others, reach, theme, panels.domains)
    if cascade is not None:
        onset = cascade.spike_onset
        name = "early warning" if scene.warned_at(onset) else "selected step"
        draw_path(fig, cascade, panels, reach, theme, scene.loss_at(onset), name)
    if cell is not None:
        _frame_cell(fig, cell, scene, theme)
    return fig


def height_of(layers: int) -> int:
    """Return the height of the figure in pixels for a model with so many layers."""
    return round(_pixels(layers)[1] + _AXIS_PX)


def _pixels(layers: int) -> tuple[float, float]:
    """Heights of one map and of everything above the time axis."""
    map_px = min(_MOST_PX, max(_LEAST_PX, 6.0 * layers))
    return map_px, _TITLE_PX + _LOSS_PX + 3 * (_TITLE_PX + map_px + _GAP_PX)


def _panels(layers: np.ndarray) -> PanelLayout:
    """The vertical domains of the panels, the loss on top."""
    map_px, plot_px = _pixels(len(layers))
    top = 1 - _TITLE_PX / plot_px
    domains = [(top - _LOSS_PX / plot_px, top)]
    for _ in STAGES:
        top = domains[-1][0] - (_GAP_PX + _TITLE_PX) / plot_px
        domains.append((max(0.0, top - map_px / plot_px), top))
    return PanelLayout(tuple(domains), layers.tolist(), plot_px)


def _reach(scene: CascadeScene) -> tuple[float, float]:
    """The ends of the time axis: half a step beyond the window."""
    low, high = scene.window
    return low - 0.5, high + 0.5


def _layout_axes(fig: go.Figure, scene: CascadeScene, panels: PanelLayout, theme: Theme) -> None:
    cursor: Any = {"showspikes": True, "spikemode": "across", "spikethickness": 1}
    cursor |= {"spikecolor": theme.cursor, "spikedash": "dot"}
    above_maps = _TITLE_PX + _LOSS_PX + _TITLE_PX + _GAP_PX
    fig.update_layout(
        xaxis=time_axis(theme, _reach(scene), anchor="y4", showgrid=False, **cursor),
        coloraxis=robust_z(theme, length=1 - above_maps / panels.pixels),
        margin={"l": 58, "r": 76, "t": 2, "b": 42},
    )


def _draw_loss(fig: go.Figure, scene: CascadeScene, panels: PanelLayout, theme: Theme) -> None:
    low, high = scene.window
    loss_S = scene.steps["loss"][scene.in_window]
    finite = loss_S[np.isfinite(loss_S)]
    least, most = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    pad = max(0.08 * (most - least), 1e-3)
    panels.loss_range = (least - pad, most + 1.6 * pad)
    fig.update_layout(
        yaxis=axis(theme, domain=panels.domains[0], range=panels.loss_range, nticks=5, anchor="x")
    )
    unit = METRICS["steps", "loss"].unit
    _draw_title(fig, panels, 0, f"<b>loss</b>  {_soft(unit, theme)}", theme)
    for span in scene.spans:
        if span.end >= low and span.start <= high:
            _draw_routing_span(fig, span, scene.window, theme)
    draw_superseded(fig, scene.superseded, low, high, theme, {"loss": "y"})
    draw_curve(
        fig,
        scene.steps["step"][scene.in_window],
        loss_S,
        theme,
        name="loss",
        hover="loss %{y:.4g} at step %{x:,d}",
        extra="<extra></extra>",
    )


def _draw_routing_span(
    fig: go.Figure, span: RoutingSpan, window: tuple[int, int], theme: Theme
) -> None:
    """A coloured band behind the loss, with a label if there is room for it."""
    low, high = window
    start = max(span.start, low)
    end = min(span.end, high)
    fig.add_shape(
        type="rect",
        x0=start - 0.5,
        x1=end + 0.5,
        y0=0,
        y1=1,
        yref="y domain",
        fillcolor=faded(routing_colour(span.mode, theme), 0.13),
        line_width=0,
        layer="below",
    )
    if span.mode == "on" and end - start > (high - low) / 8:
        fig.add_annotation(
            x=(start + end) / 2,
            y=1,
            yref="y domain",
            yanchor="top",
            text="anticipatory routing on",
            showarrow=False,
            font={"size": 11, "color": theme.on},
        )


def _draw_stage(
    fig: go.Figure, scene: CascadeScene, stage: int, panels: PanelLayout, theme: Theme
) -> None:
    """The map of one stage: the score of each layer (rows) at each step (columns)."""
    name, explanation = STAGES[stage]
    title = f"<b>{stage} · {name}</b>  {_soft(explanation, theme)}"
    _draw_title(fig, panels, stage, title, theme)
    names = [str(layer) for layer in panels.layers]
    rows = tuple((int(layer), 1) for layer in panels.layers)
    score_LS = scene.stages.scores[stage - 1]
    metric = METRICS["steps", f"stage{stage}_score"]
    columns = binned(Grid(metric, rows, scene.stages.steps, score_LS))
    scored = len(columns.left_B) > 0
    _layout_stage_axis(fig, stage, names if scored else [], panels, theme)
    if not scored:
        _draw_missing(fig, scene, stage, panels, theme)
        return
    hover = (
        f"<b>layer %{{y}}</b> · step %{{x:,.0f}}<br>"
        f"{name} %{{customdata:.1f}} robust z<extra></extra>"
    )
    fig.add_heatmap(
        z=z_shade(columns.values_RB),
        customdata=columns.values_RB,
        dx=columns.width,
        x0=float(columns.left_B[0]) + (columns.width - 1) / 2,
        y=names,
        yaxis=f"y{stage + 1}",
        coloraxis="coloraxis",
        hoverongaps=False,
        name=f"stage {stage}",
        hovertemplate=hover,
    )


def _layout_stage_axis(
    fig: go.Figure, stage: int, names: Sequence[str], panels: PanelLayout, theme: Theme
) -> None:
    """The layers from top to bottom; without `names` an empty axis."""
    kind: dict[str, Any] = {"range": [0, 1], "tickvals": []}
    if names:
        kind = {"type": "category", "categoryorder": "array", "categoryarray": list(names)}
        kind |= {"range": [len(names) - 0.5, -0.5]}
        kind |= {"tickvals": names[:: max(1, -(-len(names) // 8))]}
    shape: dict[str, Any] = {"domain": panels.domains[stage], "autorange": False, "anchor": "x"}
    shape |= {"showgrid": False, "ticks": ""}
    fig.update_layout({f"yaxis{stage + 1}": axis(theme, "layer", **shape, **kind)})


def _draw_missing(
    fig: go.Figure, scene: CascadeScene, stage: int, panels: PanelLayout, theme: Theme
) -> None:
    """A sentence in place of a map without scores."""
    text = scene.missing.get(stage, "Nothing of this stage was recorded here.")
    middle = sum(panels.domains[stage]) / 2
    add_text(fig, text, 0.5, middle, theme.soft, 13, xanchor="auto", yanchor="auto", align="center")
    # An empty trace keeps the axis, and the position of the next traces.
    fig.add_scatter(x=[None], y=[None], yaxis=f"y{stage + 1}", hoverinfo="skip")


def _draw_title(fig: go.Figure, panels: PanelLayout, panel: int, text: str, theme: Theme) -> None:
    # The background hides the path behind the words.
    top = panels.domains[panel][1]
    add_text(fig, text, 0, top, theme.ink, yshift=2, bgcolor=theme.paper)


def _soft(text: str, theme: Theme) -> str:
    return f'<span style="color:{theme.soft}">{text}</span>'


def _frame_cell(
    fig: go.Figure, cell: tuple[int, int, int], scene: CascadeScene, theme: Theme
) -> None:
    stage, layer, step = cell
    low, high = scene.window
    layers = scene.stages.layers.tolist()
    if layer not in layers or not low <= step <= high:
        return
    row = layers.index(layer)
    half = max(0.5, (high - low) / 220)
    # Two lines, so that the frame is visible on the palest and on the deepest colour.
    for colour, width in ((theme.paper, 4.5), (theme.ink, 1.8)):
        fig.add_shape(
            type="rect",
            x0=step - half,
            x1=step + half,
            y0=row - 0.5,
            y1=row + 0.5,
            yref=f"y{stage + 1}",
            line={"color": colour, "width": width},
        )
