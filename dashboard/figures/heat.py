"""Heat maps of rows over steps, stacked on one time axis and one colour axis."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.data.grid import Grid, row_name
from geodiag.dashboard.data.timeline_marks import Mark
from geodiag.dashboard.figures.colour_scale import shade
from geodiag.dashboard.figures.event_marks import draw_marks
from geodiag.dashboard.figures.style import EMPTY_PX, Theme, axis, base, empty, time_axis, upright
from geodiag.dashboard.figures.time_bins import Binned, binned
from geodiag.metrics.schema import SITES

# R rows, B columns.


class Panel(NamedTuple):
    """One heat map: a grid and the sentence above it."""

    grid: Grid
    title: str


_TITLE_PX, _AXIS_PX, _MOST_CROSSES = 30, 46, 300


def heat_map(
    panels: Sequence[Panel],
    theme: Theme,
    window: tuple[int, int] | None = None,
    *,
    marks: Sequence[Mark] = (),
    step: int | None = None,
    row: str | None = None,
    experts: bool = False,
    centre: float | None = None,
    step_extent: tuple[int, int] | None = None,
    title: str = "step",
    nothing: str = "Not recorded in this run.",
) -> go.Figure:
    """Rows in static order, the first on top. Thin lines are `marks`, a cursor is `step`, a frame
    is `row`.

    `centre` is the value that is drawn as neither high nor low, `extent` the time axis's range
    where no window is given, `title` what that axis is called.
    """
    low, high = window or (None, None)
    shown = [(p, p.grid.window(low, high).measured()) for p in panels]
    shown = [(p, g) for p, g in shown if g.rows]
    if not shown:
        return empty(nothing, theme)
    columns = [binned(g) for _, g in shown]
    tall = _panel_pixels([len(g.rows) for _, g in shown])
    inner = sum(tall) + _TITLE_PX * len(tall)
    fig = base(theme, height_of([len(g.rows) for _, g in shown]))
    every = np.concatenate([c.values_RB.ravel() for c in columns])
    colours = shade(shown[0][1].metric, every, theme, centre)
    bar = colours.axis.get("colorbar", {}) | {
        "len": 1 - _TITLE_PX / inner,
        "y": 0,
        "yanchor": "bottom",
    }
    fig.update_layout(coloraxis=colours.axis | {"colorbar": bar}, margin={"t": 4, "b": 42})
    top, domains = 1.0, []
    for i, ((panel, grid), column, pixels) in enumerate(zip(shown, columns, tall, strict=True), 1):
        top -= _TITLE_PX / inner
        names = _names(grid, experts)
        _panel(fig, column, names, i, colours.log, grid, theme)
        ticks = _ticks(grid, names, experts)
        fig.update_layout({
            f"yaxis{_n(i)}": axis(
                theme, "expert" if experts else "layer", domain=[max(0.0, top - pixels / inner), top],
                type="category", autorange="reversed",
                tickvals=[t[0] for t in ticks], ticktext=[t[1] for t in ticks], showgrid=False, anchor="x", ticks="",
                categoryorder="array", categoryarray=names,
            )
        })  # fmt: skip
        fig.add_annotation(
            text=panel.title, x=0, y=top, xref="paper", yref="paper", xanchor="left", yanchor="bottom",
            showarrow=False, font={"size": 12.5, "color": theme.ink}, yshift=3, align="left",
        )  # fmt: skip
        if row in names:
            at = names.index(row)
            fig.add_shape(
                type="rect", x0=0, x1=1, xref="x domain", y0=at - 0.5, y1=at + 0.5, yref=f"y{_n(i)}",
                line={"color": theme.cursor, "width": 1},
            )  # fmt: skip
        domains.append((max(0.0, top - pixels / inner), top))
        top -= pixels / inner
    first, last = min(c.left_B[0] for c in columns), max(c.left_B[-1] + c.width for c in columns)
    reach = window or (
        (step_extent[0] - 0.5, step_extent[1] + 0.5) if step_extent else (first - 0.5, last - 0.5)
    )
    fig.update_layout(
        xaxis=time_axis(theme, reach, title, anchor=f"y{_n(len(shown))}", showgrid=False)
    )
    draw_marks(fig, marks, (first, last), theme, domains)
    if step is not None:
        fig.update_layout(
            shapes=[*fig.layout.shapes, *(upright(step, theme.ink, "dot", d) for d in domains)]
        )
    return fig


def height_of(rows: Sequence[int]) -> int:
    """Pixels of a heat map whose panels have so many rows; of the sentence in its place where there
    are none.
    """
    tall = _panel_pixels(rows)
    return round(sum(tall) + _TITLE_PX * len(tall) + _AXIS_PX) if tall else EMPTY_PX


def _panel_pixels(rows: Sequence[int]) -> list[float]:
    return [_row_pixels(n) * n for n in rows if n]


def _panel(
    fig: go.Figure, column: Binned, names: list[str], i: int, log: bool, grid: Grid, theme: Theme
) -> None:
    value_RB = np.where(np.isinf(column.values_RB), np.nan, column.values_RB)
    when = (
        f"worst of {column.width} steps around %{{x:,.0f}}" if column.merged else "step %{x:,.0f}"
    )
    shown = {"z": value_RB}
    if log:
        # A zero is a value, the lowest colour there is; only NaN may look like a gap.
        shown = {"z": np.log10(np.maximum(value_RB, 1e-30)), "customdata": value_RB}
    number = _hover("customdata" if log else "z", grid.metric.unit)
    fig.add_heatmap(
        **shown, x0=float(column.left_B[0]) + (column.width - 1) / 2, dx=column.width, y=names, coloraxis="coloraxis",
        yaxis=f"y{_n(i)}", hovertemplate=f"<b>%{{y}}</b> · {when}<br>{grid.metric.name} {number}<extra></extra>",
        hoverongaps=False, name=grid.metric.name,
    )  # fmt: skip
    r, b = np.nonzero(np.isinf(column.values_RB))
    if len(r):
        some = slice(None, None, max(1, len(r) // _MOST_CROSSES))
        fig.add_scatter(
            x=column.left_B[b[some]] + (column.width - 1) / 2, y=[names[k] for k in r[some]], yaxis=f"y{_n(i)}",
            mode="markers", marker={"symbol": "x-thin", "size": 6, "line": {"width": 1.5, "color": theme.spike}},
            hovertemplate="<b>%{y}</b> · step %{x:,.0f}<br>NaN or infinite<extra></extra>",
        )  # fmt: skip


def _hover(value: str, unit: str) -> str:
    """A value under the pointer: `59.4%`, `×1.019`, `3.2 nats`."""
    if unit == "share":
        return f"%{{{value}:.3p}}"
    if unit == "×":
        return f"×%{{{value}:.5g}}"
    return f"%{{{value}:.5g}}" + ("" if unit in ("1", "") else f" {unit}")


def _names(grid: Grid, experts: bool) -> list[str]:
    return [str(r[1]) if experts else row_name(r) for r in grid.rows]


def _ticks(grid: Grid, names: list[str], experts: bool) -> list[tuple[str, str]]:
    """(row, label) of the rows that get a label: every row where there is room, else every so many
    layers.
    """
    several = len({r[1] for r in grid.rows}) > 1
    if len(names) <= 16:
        label = [
            n if experts else f"{r[0]} {SITES[r[1]]}" if several else str(r[0])
            for n, r in zip(names, grid.rows, strict=True)
        ]
        return list(zip(names, label, strict=True))
    leading = [
        (n, n if experts else str(r[0]))
        for n, r in zip(names, grid.rows, strict=True)
        if experts or r[1] == grid.rows[0][1]
    ]
    return leading[:: max(1, -(-len(leading) // 12))]


def _row_pixels(rows: int) -> float:
    return 24 if rows <= 12 else 18 if rows <= 16 else 8 if rows <= 40 else max(2.5, 280 / rows)


def _n(i: int) -> str:
    return "" if i == 1 else str(i)
