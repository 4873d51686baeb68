"""The maps of one site as heat maps with numbers: H_res (N×N), H_pre and H_post (1×N)."""

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.figures.style import Theme, add_text, axis, axis_number, base, empty

_NAMES = {"res": "H<sub>res</sub>", "pre": "H<sub>pre</sub>", "post": "H<sub>post</sub>"}
_DOMAINS = {
    "res": ((0.0, 0.62), (0.0, 0.9)),
    "pre": ((0.7, 1.0), (0.56, 0.74)),
    "post": ((0.7, 1.0), (0.08, 0.26)),
}
"""Domains (x, y) of each map in the figure."""


def map_matrices(maps: dict[str, np.ndarray], theme: Theme, height: int = 250) -> go.Figure:
    """Draw the maps: rows are streams out, columns streams in.

    The colours reach at least from −1 to 1, with 0 in the middle.
    """
    if not maps:
        return empty(
            "No token-mean maps were recorded for this site up to this step.", theme, height
        )
    if not any(np.isfinite(m).any() for m in maps.values()):
        return empty("The maps of this site are not finite here.", theme, height)
    fig = base(theme, height)
    reach = max(1.0, *(float(np.nanmax(np.abs(m))) for m in maps.values()))
    named = [(name, maps[name]) for name in _NAMES if name in maps]
    for i, (name, cells) in enumerate(named, 1):
        _draw_map(fig, name, cells, axis_number(i), theme)
    fig.update_layout(
        coloraxis={"colorscale": theme.gain, "cmin": -reach, "cmax": reach, "showscale": False},
        margin={"l": 12, "r": 12, "t": 8, "b": 8},
    )
    return fig


def _draw_map(fig: go.Figure, name: str, cells: np.ndarray, n: str, theme: Theme) -> None:
    """Draw one map with its numbers and its name; a column is drawn as a row."""
    cell_NN = cells.reshape(1, -1) if 1 in cells.shape else cells
    x, y = _DOMAINS[name]
    hidden = axis(theme, showgrid=False, showticklabels=False, ticks="")
    fig.update_layout(
        {
            f"xaxis{n}": hidden | {"domain": x, "anchor": f"y{n}", "constrain": "domain"},
            f"yaxis{n}": hidden | {"domain": y, "anchor": f"x{n}", "autorange": "reversed"},
        }
    )
    fig.add_heatmap(
        z=cell_NN,
        xaxis=f"x{n}",
        yaxis=f"y{n}",
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
        texttemplate="%{z:.2f}" if cell_NN.shape[1] <= 8 else None,
        textfont={"size": 11 if name == "res" else 9},
        hovertemplate=f"{_NAMES[name]} out %{{y}}, in %{{x}}<br>%{{z:.4f}}<extra></extra>",
    )
    add_text(fig, _NAMES[name], x[0], y[1], theme.ink, 13)
