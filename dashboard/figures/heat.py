"""Heat maps of rows over steps, stacked on one time axis and one colour axis."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.data.grid import Grid, row_name
from geodiag.dashboard.data.timeline_marks import Mark
from geodiag.dashboard.figures.colour_scale import shade
from geodiag.dashboard.figures.event_marks import draw_marks
from geodiag.dashboard.figures.style import (
    EMPTY_PX,
    Theme,
    add_text,
    axis,
    axis_number,
    base,
    empty,
    time_axis,
    upright,
)
from geodiag.dashboard.figures.time_bins import Binned, binned
from geodiag.metrics.schema import SITES

# R rows, B columns.


class Panel(NamedTuple):
    """One heat map: a grid and the title above it."""

    grid: Grid
    title: str


_TITLE_PX = 30
_AXIS_PX = 46
_MOST_CROSSES = 300


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
    """Draw panels of rows over steps, the first row on top.

    Vertical lines are `marks`, a dotted line is `step`, a frame marks `row`. `centre` is the value
    in the middle of the colours, `step_extent` the range of the time axis if there is no window,
    `title` the title of the time axis.
    """
    low, high = window or (None, None)
    shown = [Panel(p.grid.window(low, high).measured(), p.title) for p in panels]
    shown = [p for p in shown if p.grid.rows]
    if not shown:
        return empty(nothing, theme)
    rows = [len(p.grid.rows) for p in shown]
    columns = [binned(p.grid) for p in shown]
    domains = _domains(rows)
    fig = base(theme, height_of(rows))
    log = _layout_colours(fig, shown, columns, centre, theme)
    for i, (panel, column) in enumerate(zip(shown, columns, strict=True), 1):
        _draw_panel(fig, panel, column, i, domains[i - 1], log, experts, theme)
        _frame_row(fig, panel.grid, row, i, experts, theme)
    first = min(c.left_B[0] for c in columns)
    last = max(c.left_B[-1] + c.width for c in columns)
    reach = window or _half_step_around(step_extent or (first, last - 1))
    anchor = f"y{axis_number(len(shown))}"
    fig.update_layout(xaxis=time_axis(theme, reach, title, anchor=anchor, showgrid=False))
    draw_marks(fig, marks, (first, last), theme, domains)
    if step is not None:
        cursor = [upright(step, theme.ink, "dot", d) for d in domains]
        fig.update_layout(shapes=[*fig.layout.shapes, *cursor])
    return fig


def _half_step_around(steps: tuple[int, int]) -> tuple[float, float]:
    return steps[0] - 0.5, steps[1] + 0.5


def _domains(rows: Sequence[int]) -> list[tuple[float, float]]:
    """The vertical domain of each panel, with room for its title above it."""
    heights = _panel_pixels(rows)
    plot_px = sum(heights) + _TITLE_PX * len(heights)
    top = 1.0
    domains = []
    for pixels in heights:
        top -= _TITLE_PX / plot_px
        bottom = top - pixels / plot_px
        domains.append((max(0.0, bottom), top))
        top = bottom
    return domains


def _layout_colours(
    fig: go.Figure,
    panels: Sequence[Panel],
    columns: Sequence[Binned],
    centre: float | None,
    theme: Theme,
) -> bool:
    """Set the common colour axis; return True if values enter it as logarithms."""
    values = np.concatenate([c.values_RB.ravel() for c in columns])
    colours = shade(panels[0].grid.metric, values, theme, centre)
    heights = _panel_pixels([len(p.grid.rows) for p in panels])
    length = 1 - _TITLE_PX / (sum(heights) + _TITLE_PX * len(heights))
    bar = colours.axis.get("colorbar", {}) | {"len": length, "y": 0, "yanchor": "bottom"}
    fig.update_layout(coloraxis=colours.axis | {"colorbar": bar}, margin={"t": 4, "b": 42})
    return colours.log


def _frame_row(
    fig: go.Figure, grid: Grid, row: str | None, i: int, experts: bool, theme: Theme
) -> None:
    names = _names(grid, experts)
    if row not in names:
        return
    at = names.index(row)
    fig.add_shape(
        type="rect",
        x0=0,
        x1=1,
        xref="x domain",
        y0=at - 0.5,
        y1=at + 0.5,
        yref=f"y{axis_number(i)}",
        line={"color": theme.cursor, "width": 1},
    )


def height_of(rows: Sequence[int]) -> int:
    """Return the height in pixels of a heat map whose panels have so many rows.

    Without any row: the height of the sentence in its place.
    """
    heights = _panel_pixels(rows)
    if not heights:
        return EMPTY_PX
    return round(sum(heights) + _TITLE_PX * len(heights) + _AXIS_PX)


def _panel_pixels(rows: Sequence[int]) -> list[float]:
    return [_row_pixels(n) * n for n in rows if n]


def _draw_panel(
    fig: go.Figure,
    panel: Panel,
    column: Binned,
    i: int,
    domain: tuple[float, float],
    log: bool,
    experts: bool,
    theme: Theme,
) -> None:
    """Draw the axis, the title and the values of panel `i`."""
    names = _names(panel.grid, experts)
    ticks = _ticks(panel.grid, names, experts)
    rows: dict[str, Any] = {"type": "category", "autorange": "reversed"}
    rows |= {"categoryorder": "array", "categoryarray": names}
    rows |= {"tickvals": [t[0] for t in ticks], "ticktext": [t[1] for t in ticks], "ticks": ""}
    title = "expert" if experts else "layer"
    fig.update_layout(
        {
            f"yaxis{axis_number(i)}": axis(
                theme, title, domain=domain, showgrid=False, anchor="x", **rows
            )
        }
    )
    add_text(fig, panel.title, 0, domain[1], theme.ink, yshift=3)
    _draw_values(fig, column, names, i, log, panel.grid)
    _draw_crosses(fig, column, names, i, theme)


def _draw_values(
    fig: go.Figure, column: Binned, names: list[str], i: int, log: bool, grid: Grid
) -> None:
    value_RB = np.where(np.isinf(column.values_RB), np.nan, column.values_RB)
    when = "step %{x:,.0f}"
    if column.merged:
        when = f"worst of {column.width} steps around %{{x:,.0f}}"
    shown = {"z": value_RB}
    if log:
        # A zero gets the lowest colour: only NaN may be drawn as a gap.
        shown = {"z": np.log10(np.maximum(value_RB, 1e-30)), "customdata": value_RB}
    number = _hover("customdata" if log else "z", grid.metric.unit)
    fig.add_heatmap(
        **shown,
        x0=float(column.left_B[0]) + (column.width - 1) / 2,
        dx=column.width,
        y=names,
        coloraxis="coloraxis",
        yaxis=f"y{axis_number(i)}",
        hovertemplate=f"<b>%{{y}}</b> · {when}<br>{grid.metric.name} {number}<extra></extra>",
        hoverongaps=False,
        name=grid.metric.name,
    )


def _draw_crosses(fig: go.Figure, column: Binned, names: list[str], i: int, theme: Theme) -> None:
    """A cross at each value that was measured and is not finite, fewer if there are very many."""
    r, b = np.nonzero(np.isinf(column.values_RB))
    if not len(r):
        return
    some = slice(None, None, max(1, len(r) // _MOST_CROSSES))
    line = {"width": 1.5, "color": theme.spike}
    fig.add_scatter(
        x=column.left_B[b[some]] + (column.width - 1) / 2,
        y=[names[k] for k in r[some]],
        yaxis=f"y{axis_number(i)}",
        mode="markers",
        marker={"symbol": "x-thin", "size": 6, "line": line},
        hovertemplate="<b>%{y}</b> · step %{x:,.0f}<br>NaN or infinite<extra></extra>",
    )


def _hover(value: str, unit: str) -> str:
    """Return the hover text of a value: `59.4%`, `×1.019`, `3.2 nats`."""
    if unit == "share":
        return f"%{{{value}:.3p}}"
    if unit == "×":
        return f"×%{{{value}:.5g}}"
    return f"%{{{value}:.5g}}" + ("" if unit in ("1", "") else f" {unit}")


def _names(grid: Grid, experts: bool) -> list[str]:
    return [str(r[1]) if experts else row_name(r) for r in grid.rows]


def _ticks(grid: Grid, names: list[str], experts: bool) -> list[tuple[str, str]]:
    """Return (row, label) of the rows that get a label: every row if there is room."""
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
    for most, pixels in ((12, 24.0), (16, 18.0), (40, 8.0)):
        if rows <= most:
            return pixels
    return max(2.5, 280 / rows)
