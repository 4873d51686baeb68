"""The path of a cascade: rings where each stage left its range, a line through them in time, and
what each one says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import plotly.graph_objects as go

from geodiag.cascade.explain import Cascade, Onset
from geodiag.cascade.words import layers_in_words, measured, where
from geodiag.dashboard.figures.style import Theme, faded, upright


@dataclass
class Place:
    """Where things are: the panels' vertical domains (the loss first, then the stages), and the
    rows in them.
    """

    domains: tuple[tuple[float, float], ...]
    layers: list[int]
    pixels: float
    """Height of the plot."""
    loss_range: tuple[float, float] = (0.0, 1.0)

    def of_layer(self, stage: int, layer: int) -> float:
        """The middle of a layer's row, as a share of the height."""
        low, high = self.domains[stage]
        return high - (self.layers.index(layer) + 0.5) / len(self.layers) * (high - low)

    def of_loss(self, loss: float | None) -> float:
        """The height of a value of the loss; its panel's top where it is not finite."""
        low, high = self.domains[0]
        if loss is None:
            return high
        a, b = self.loss_range
        return low + min(max((loss - a) / (b - a), 0.0), 1.0) * (high - low)


def draw_path(
    fig: go.Figure,
    cascade: Cascade,
    place: Place,
    reach: tuple[float, float],
    theme: Theme,
    loss: float | None,
    asked: str,
) -> None:
    """Rings, line, dashes and labels of one cascade; `asked` is what its end is called where the
    loss did not spike.
    """
    end_said = _lead(cascade, asked)
    knots = [k for k in cascade.path if k.stage in (1, 2, 3) and k.layer in place.layers]
    heads = first_of_each_stage(knots, cascade)
    end = (float(cascade.spike_onset), place.of_loss(loss))
    points = [(float(k.step), place.of_layer(int(k.stage), int(k.layer))) for k in heads]  # type: ignore[arg-type]
    outside = cascade.cause in ("lr", "data") and cascade.onset is not None
    if outside:
        points = [(float(cascade.onset or 0), place.domains[0][0]), *points]
    for x in sorted({p[0] for p in [*points, end]}):
        for domain in place.domains:
            fig.add_shape(upright(x, theme.spike, "dash", domain))
    _line(fig, [*points, end], theme)
    _dots(fig, knots, heads, place, theme)
    for head, point in zip(heads, points[outside:], strict=True):
        _label(fig, point, _says(head, knots, cascade), place, int(head.stage or 1), reach, theme)
    if outside:
        _label(fig, points[0], _outside(cascade, end_said), place, 0, reach, theme)
    fig.add_scatter(
        x=[end[0]], y=[loss], mode="markers", marker={"size": 11, "color": theme.spike, "line": {"width": 0}},
        name="the loss", hovertemplate=f"{end_said}<extra></extra>",
    )  # fmt: skip
    if not outside:
        _label(fig, end, end_said, place, 0, reach, theme)


def first_of_each_stage(knots: Sequence[Onset], cascade: Cascade) -> list[Onset]:
    """The origin, then the first onset of every other stage, in time, up to the loss."""
    heads: list[Onset] = []
    for knot in knots:
        before = knot.step <= cascade.spike_onset or not heads
        if before and knot.stage not in [h.stage for h in heads]:
            heads.append(knot)
    return heads


def _line(fig: go.Figure, points: Sequence[tuple[float, float]], theme: Theme) -> None:
    """One smooth line; its last piece, to the loss, runs across the maps between and is thinner."""
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        last, middle = i == len(points) - 2, (x0 + x1) / 2
        fig.add_shape(
            type="path", path=f"M {x0},{y0} C {middle},{y0} {middle},{y1} {x1},{y1}", xref="x", yref="paper",
            line={"color": faded(theme.spike, 0.65 if last else 0.95), "width": 1.4 if last else 2.4},
        )  # fmt: skip


def _dots(
    fig: go.Figure, knots: Sequence[Onset], heads: Sequence[Onset], place: Place, theme: Theme
) -> None:
    for stage in (1, 2, 3):
        mine = [k for k in knots if k.stage == stage]
        if not mine:
            continue
        big = [k in heads for k in mine]
        fig.add_scatter(
            x=[k.step for k in mine], y=[str(k.layer) for k in mine], yaxis=f"y{stage + 1}", mode="markers",
            marker={
                "symbol": "circle-open", "size": [14 if b else 6 for b in big], "color": theme.spike,
                "line": {"width": [2.6 if b else 1.3 for b in big], "color": theme.spike},
            },
            name=f"onsets of stage {stage}", customdata=[_hover(k) for k in mine],
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip


def _hover(knot: Onset) -> str:
    place = where(knot.layer, knot.site, knot.expert)
    return f"<b>{place}</b><br>{knot.metric} {knot.score:.0f} σ from step {knot.step:,}"


def _says(head: Onset, knots: Sequence[Onset], cascade: Cascade) -> str:
    """Two lines: where, and what was measured."""
    origin = cascade.cause == "layer" and (head.stage, head.layer) == (cascade.stage, cascade.layer)
    if origin:
        place = " · ".join(where(cascade.layer, cascade.site, cascade.expert).split(", "))
        return f"<b>{place}</b><br>{measured(cascade.evidence[0]) if cascade.evidence else head.metric}"
    layers = sorted({int(k.layer) for k in knots if k.stage == head.stage and k.layer is not None})
    later = (
        ""
        if cascade.onset is None or head.step == cascade.onset
        else f", {_after(head.step - cascade.onset)}"
    )
    return f"<b>{layers_in_words(layers)}</b><br>{head.metric} {head.score:.0f} σ{later}"


def _after(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)} later"


def _lead(cascade: Cascade, asked: str) -> str:
    what = "loss leaves its trend" if cascade.spike else asked
    if cascade.lead is None:
        return what
    return f"{what}<br><b>{_after(cascade.lead) if cascade.lead > 0 else 'in the same step'}</b>"


def _outside(cascade: Cascade, end_said: str) -> str:
    if cascade.cause == "lr" and cascade.evidence:
        e = cascade.evidence[0]
        what = f"learning rate ×{e.value / e.usual:.3g}"
    else:
        what = f"the batch: {escape(cascade.domain)}" if cascade.domain else "the batch"
    return f"<b>{what}</b><br>{end_said.replace('<br>', ' ')}"


def _label(
    fig: go.Figure,
    point: tuple[float, float],
    text: str,
    place: Place,
    panel: int,
    reach: tuple[float, float],
    theme: Theme,
) -> None:
    """A framed note beside a ring: before it, where it is still quiet, and in the other half of its
    panel.
    """
    x, y = point
    low, high = place.domains[panel]
    left = (x - reach[0]) / (reach[1] - reach[0]) > 0.3
    upper = y > (low + high) / 2
    target = low + 0.26 * (high - low) if upper else high - 0.26 * (high - low)
    fig.add_annotation(
        x=x, y=y, xref="x", yref="paper", text=text, showarrow=True, arrowhead=0, arrowwidth=1.2, arrowcolor=theme.spike,
        ax=-46 if left else 46, ay=(y - target) * place.pixels, xanchor="right" if left else "left", yanchor="middle",
        align="left", font={"size": 11.5, "color": theme.ink}, bgcolor=faded(theme.paper, 0.93),
        bordercolor=faded(theme.spike, 0.55), borderwidth=1, borderpad=4, standoff=8,
    )  # fmt: skip
