"""The path of a cascade: rings where each stage left its range, a line through them, labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import plotly.graph_objects as go

from geodiag.cascade.explain import Cascade, Onset
from geodiag.cascade.verdict_text import layers_label, measurement_label, place_label
from geodiag.dashboard.figures.style import Theme, faded, upright


@dataclass
class PanelLayout:
    """Vertical positions in the cascade figure: the panels (loss, then stages) and their layers."""

    domains: tuple[tuple[float, float], ...]
    layers: list[int]
    pixels: float
    """Height of the plot."""
    loss_range: tuple[float, float] = (0.0, 1.0)

    def of_layer(self, stage: int, layer: int) -> float:
        """Return the middle of the row of a layer, as a share of the height."""
        low, high = self.domains[stage]
        return high - (self.layers.index(layer) + 0.5) / len(self.layers) * (high - low)

    def of_loss(self, loss: float | None) -> float:
        """Return the height of a loss value; the top of the panel if it is not finite."""
        low, high = self.domains[0]
        if loss is None:
            return high
        a, b = self.loss_range
        return low + min(max((loss - a) / (b - a), 0.0), 1.0) * (high - low)


def draw_path(
    fig: go.Figure,
    cascade: Cascade,
    panels: PanelLayout,
    reach: tuple[float, float],
    theme: Theme,
    loss: float | None,
    step_name: str,
) -> None:
    """Draw rings, line, dashes and labels of one cascade.

    `step_name` is the name of the last point if the loss did not spike.
    """
    end_label = _end_label(cascade, step_name)
    onsets = [k for k in cascade.path if k.stage in (1, 2, 3) and k.layer in panels.layers]
    first_onsets = first_of_each_stage(onsets, cascade)
    end = (float(cascade.spike_onset), panels.of_loss(loss))
    points = [
        (float(k.step), panels.of_layer(int(k.stage), int(k.layer)))  # type: ignore[arg-type]
        for k in first_onsets
    ]
    outside = cascade.cause in ("lr", "data") and cascade.onset is not None
    if outside:
        points = [(float(cascade.onset or 0), panels.domains[0][0]), *points]
    for x in sorted({p[0] for p in [*points, end]}):
        for domain in panels.domains:
            fig.add_shape(upright(x, theme.spike, "dash", domain))
    _draw_line(fig, [*points, end], theme)
    _draw_rings(fig, onsets, first_onsets, panels, theme)
    for first_onset, point in zip(first_onsets, points[outside:], strict=True):
        text = _onset_label(first_onset, onsets, cascade)
        _draw_label(fig, point, text, panels, int(first_onset.stage or 1), reach, theme)
    if outside:
        _draw_label(fig, points[0], _outside_label(cascade, end_label), panels, 0, reach, theme)
    fig.add_scatter(
        x=[end[0]],
        y=[loss],
        mode="markers",
        marker={"size": 11, "color": theme.spike, "line": {"width": 0}},
        name="the loss",
        hovertemplate=f"{end_label}<extra></extra>",
    )
    if not outside:
        _draw_label(fig, end, end_label, panels, 0, reach, theme)


def first_of_each_stage(onsets: Sequence[Onset], cascade: Cascade) -> list[Onset]:
    """Return the origin and the first onset of every other stage up to the loss, in order."""
    first_onsets: list[Onset] = []
    for onset in onsets:
        before = onset.step <= cascade.spike_onset or not first_onsets
        if before and onset.stage not in [h.stage for h in first_onsets]:
            first_onsets.append(onset)
    return first_onsets


def _draw_line(fig: go.Figure, points: Sequence[tuple[float, float]], theme: Theme) -> None:
    """Draw one smooth line. The last piece leads to the loss across other maps and is thinner."""
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        last = i == len(points) - 2
        middle = (x0 + x1) / 2
        fig.add_shape(
            type="path",
            path=f"M {x0},{y0} C {middle},{y0} {middle},{y1} {x1},{y1}",
            xref="x",
            yref="paper",
            line={
                "color": faded(theme.spike, 0.65 if last else 0.95),
                "width": 1.4 if last else 2.4,
            },
        )


def _draw_rings(
    fig: go.Figure,
    onsets: Sequence[Onset],
    first_onsets: Sequence[Onset],
    panels: PanelLayout,
    theme: Theme,
) -> None:
    for stage in (1, 2, 3):
        mine = [k for k in onsets if k.stage == stage]
        if not mine:
            continue
        big = [k in first_onsets for k in mine]
        fig.add_scatter(
            x=[k.step for k in mine],
            y=[str(k.layer) for k in mine],
            yaxis=f"y{stage + 1}",
            mode="markers",
            marker={
                "symbol": "circle-open",
                "size": [14 if b else 6 for b in big],
                "color": theme.spike,
                "line": {"width": [2.6 if b else 1.3 for b in big], "color": theme.spike},
            },
            name=f"onsets of stage {stage}",
            customdata=[_hover(k) for k in mine],
            hovertemplate="%{customdata}<extra></extra>",
        )


def _hover(onset: Onset) -> str:
    panels = place_label(onset.layer, onset.site, onset.expert)
    return f"<b>{panels}</b><br>{onset.metric} {onset.score:.0f} σ from step {onset.step:,}"


def _onset_label(first_onset: Onset, onsets: Sequence[Onset], cascade: Cascade) -> str:
    """Return two lines: the place, and what was measured."""
    origin = cascade.cause == "layer" and (first_onset.stage, first_onset.layer) == (
        cascade.stage,
        cascade.layer,
    )
    if origin:
        panels = " · ".join(place_label(cascade.layer, cascade.site, cascade.expert).split(", "))
        text = measurement_label(cascade.evidence[0]) if cascade.evidence else first_onset.metric
        return f"<b>{panels}</b><br>{text}"
    layers = sorted(
        {int(k.layer) for k in onsets if k.stage == first_onset.stage and k.layer is not None}
    )
    later = (
        ""
        if cascade.onset is None or first_onset.step == cascade.onset
        else f", {_after(first_onset.step - cascade.onset)}"
    )
    return f"<b>{layers_label(layers)}</b><br>{first_onset.metric} {first_onset.score:.0f} σ{later}"


def _after(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)} later"


def _end_label(cascade: Cascade, step_name: str) -> str:
    what = "loss leaves its trend" if cascade.spike else step_name
    if cascade.lead is None:
        return what
    return f"{what}<br><b>{_after(cascade.lead) if cascade.lead > 0 else 'in the same step'}</b>"


def _outside_label(cascade: Cascade, end_label: str) -> str:
    if cascade.cause == "lr" and cascade.evidence:
        e = cascade.evidence[0]
        what = f"learning rate ×{e.value / e.usual:.3g}"
    else:
        what = f"the batch: {escape(cascade.domain)}" if cascade.domain else "the batch"
    return f"<b>{what}</b><br>{end_label.replace('<br>', ' ')}"


def _draw_label(
    fig: go.Figure,
    point: tuple[float, float],
    text: str,
    panels: PanelLayout,
    panel: int,
    reach: tuple[float, float],
    theme: Theme,
) -> None:
    """Draw a framed label beside a ring: in the quiet steps before, in the other panel half."""
    x, y = point
    low, high = panels.domains[panel]
    left = (x - reach[0]) / (reach[1] - reach[0]) > 0.3
    upper = y > (low + high) / 2
    target = low + 0.26 * (high - low) if upper else high - 0.26 * (high - low)
    fig.add_annotation(
        x=x,
        y=y,
        xref="x",
        yref="paper",
        text=text,
        showarrow=True,
        arrowhead=0,
        arrowwidth=1.2,
        arrowcolor=theme.spike,
        ax=-46 if left else 46,
        ay=(y - target) * panels.pixels,
        xanchor="right" if left else "left",
        yanchor="middle",
        align="left",
        font={"size": 11.5, "color": theme.ink},
        bgcolor=faded(theme.paper, 0.93),
        bordercolor=faded(theme.spike, 0.55),
        borderwidth=1,
        borderpad=4,
        standoff=8,
    )
