"""Residual maps of one layer and their product as small heat maps, before a step and at it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.figures.style import Theme, axis, base, empty

# N streams.


class Tile(NamedTuple):
    """One matrix and its title."""

    title: str
    cell_NN: np.ndarray

    @property
    def gain(self) -> float:
        """Largest absolute row sum: the largest factor by which the map can amplify a stream."""
        return float(np.abs(self.cell_NN.sum(1)).max())


_TITLE_PX = 19
_GAP = 0.02
"""Distance between maps, as a share of the width."""
_APART = 0.05
"""Distance between groups of maps."""
_FEW = 6
"""Fewer maps than this are not drawn larger."""


def residual_maps(
    groups: Sequence[tuple[str, Sequence[Tile]]], theme: Theme, nothing: str, tile_px: int = 132
) -> go.Figure:
    """Draw groups of (when, tiles) side by side.

    Rows of a matrix are streams out, columns streams in; 0 has the paper colour.
    """
    groups = [(when, tiles) for when, tiles in groups if tiles]
    if not groups:
        return empty(nothing, theme, 120)
    groups = [
        (when, tiles) for when, tiles in groups if all(np.isfinite(t.cell_NN).any() for t in tiles)
    ]
    if not groups:
        return empty("The residual maps are not finite here.", theme, 120)
    inner = tile_px + 3 * _TITLE_PX
    fig = base(theme, inner + 10)
    count = max(_FEW, sum(len(tiles) for _, tiles in groups))
    wide = (1 - _APART * (len(groups) - 1) - _GAP * (count - len(groups))) / count
    reach = max(1.0, *(float(np.nanmax(np.abs(t.cell_NN))) for _, tiles in groups for t in tiles))
    left = 0.0
    i = 0
    high = tile_px / inner
    for when, tiles in groups:
        _draw_text(fig, when, left, high + 2 * _TITLE_PX / inner, theme.soft, 11.5)
        for tile in tiles:
            i += 1
            _tile(fig, tile, i, (left, min(1.0, left + wide)), (0, high), theme)
            left += wide + _GAP
        left += _APART - _GAP
    fig.update_layout(
        coloraxis={"colorscale": theme.gain, "cmin": -reach, "cmax": reach, "showscale": False},
        margin={"l": 4, "r": 4, "t": 0, "b": 10},
    )
    return fig


def _tile(
    fig: go.Figure, tile: Tile, i: int, x: tuple[float, float], y: tuple[float, float], theme: Theme
) -> None:
    n = "" if i == 1 else str(i)
    hidden = axis(theme, showgrid=False, showticklabels=False, ticks="")
    fig.update_layout(
        {
            f"xaxis{n}": hidden | {"domain": x, "anchor": f"y{n}"},
            f"yaxis{n}": hidden | {"domain": y, "anchor": f"x{n}", "autorange": "reversed"},
        }
    )
    fig.add_heatmap(
        z=tile.cell_NN,
        text=[[_short(v) for v in row] for row in tile.cell_NN],
        xaxis=f"x{n}",
        yaxis=f"y{n}",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        texttemplate="%{text}" if len(tile.cell_NN) <= 4 else None,
        textfont={"size": 9.5},
        hovertemplate=f"{tile.title}<br>out %{{y}}, in %{{x}}: %{{z:.4f}}<extra></extra>",
    )
    _draw_text(fig, f"<b>{tile.title}</b><br>gain ×{tile.gain:.3g}", x[0], y[1], theme.ink, 11)


def _draw_text(fig: go.Figure, text: str, x: float, y: float, colour: str, size: float) -> None:
    fig.add_annotation(
        text=text,
        x=x,
        y=y,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
        font={"size": size, "color": colour},
        align="left",
    )


def _short(value: float) -> str:
    """Format a number in at most four characters: `.91`, `−.04`, `1.5`, `12`."""
    if abs(value) < 0.995:
        return f"{value:.2f}".replace("0.", ".", 1).replace("-", "−").replace("−.00", ".00")
    return (
        f"{value:.1f}".replace("-", "−") if abs(value) < 9.95 else f"{value:.0f}".replace("-", "−")
    )
