"""Traced tokens over depth: two projections of the streams of each token.

Points are coloured by expert; a ring marks a changed choice of experts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.data.trajectory import Trajectory
from geodiag.dashboard.figures.colours import hues
from geodiag.dashboard.figures.style import Theme, add_text, axis, base, empty, faded

_PANEL_PX = 168
_TITLE_PX = 22
_APART = 0.06
"""Distance between the panels, as a share of the width."""


def trajectories(
    now: Sequence[Trajectory], usual: Sequence[Trajectory], theme: Theme, nothing: str
) -> go.Figure:
    """Draw one panel per projection; `usual` are the same tokens before, as faint lines."""
    if not now:
        return empty(nothing, theme, 120)
    if not any(np.isfinite(t.projection_P2).any() for t in now):
        return empty("The traced tokens are not finite here.", theme, 120)
    names = max((list(t.place_P) for t in now), key=len)
    fig = base(theme, _PANEL_PX + _TITLE_PX + 40, hovermode="closest")
    experts = 1 + max((int(t.expert_P.max()) for t in now if len(t.expert_P)), default=0)
    palette = hues(max(experts, 1), theme.name == "dark")
    for k, n in enumerate(("", "2")):
        _layout_panel(fig, names, k, n, theme)
        _draw_paths(fig, usual, k, n, faded(theme.soft, 0.35))
        _draw_paths(fig, now, k, n, faded(theme.ink, 0.45))
        _draw_points(fig, now, k, n, palette, theme)
    fig.update_layout(margin={"l": 42, "r": 10, "t": 0, "b": 38})
    return fig


def _layout_panel(fig: go.Figure, names: list[str], k: int, n: str, theme: Theme) -> None:
    """The axes and the title of projection `k`: layers from left to right."""
    top = _PANEL_PX / (_PANEL_PX + _TITLE_PX)
    left, right = ((1 + _APART) / 2, 1.0) if k else (0.0, (1 - _APART) / 2)
    ticks = names[:: max(1, -(-len(names) // 8))]
    depth: dict[str, Any] = {"type": "category", "categoryorder": "array", "categoryarray": names}
    depth |= {"tickvals": ticks, "ticktext": [t.split(".")[0] for t in ticks]}
    depth |= {"showgrid": False, "ticks": ""}
    value: dict[str, Any] = {"nticks": 5, "tickformat": ".2~g"}
    fig.update_layout(
        {
            f"yaxis{n}": axis(theme, domain=(0, top), anchor=f"x{n}", **value),
            f"xaxis{n}": axis(theme, "layer", domain=(left, right), anchor=f"y{n}", **depth),
        }
    )
    add_text(fig, f"<b>projection {k + 1}</b>", left, top, theme.ink, 11.5, yshift=3)


def _draw_paths(fig: go.Figure, tokens: Sequence[Trajectory], k: int, n: str, colour: str) -> None:
    """Draw all tokens as one trace with gaps between them."""
    if not tokens:
        return
    x = [place for t in tokens for place in (*t.place_P, None)]
    y = np.concatenate([np.append(t.projection_P2[:, k], np.nan) for t in tokens])
    fig.add_scatter(
        x=x,
        y=y,
        xaxis=f"x{n}",
        yaxis=f"y{n}",
        mode="lines",
        line={"color": colour, "width": 1.1},
        hoverinfo="skip",
        connectgaps=False,
    )


def _draw_points(
    fig: go.Figure,
    tokens: Sequence[Trajectory],
    k: int,
    n: str,
    palette: Sequence[str],
    theme: Theme,
) -> None:
    points = [
        (t, i, bool(np.nan_to_num(t.flipped_P[i]) > 0))
        for t in tokens
        for i in np.flatnonzero(t.expert_P >= 0).tolist()
    ]
    fig.add_scatter(
        x=[t.place_P[i] for t, i, _ in points],
        y=[t.projection_P2[i, k] for t, i, _ in points],
        xaxis=f"x{n}",
        yaxis=f"y{n}",
        mode="markers",
        name="tokens",
        hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
        marker={
            "size": [10 if flipped else 6 for *_, flipped in points],
            "opacity": 1,
            "color": [palette[t.expert_P[i] % len(palette)] for t, i, _ in points],
            "line": {
                "width": [2.2 if flipped else 0 for *_, flipped in points],
                "color": theme.spike,
            },
        },
        text=[
            f"<b>token {t.token}</b>{t.text} · {t.place_P[i]}<br>"
            f"expert {t.expert_P[i]}{', changed' if flipped else ''}"
            for t, i, flipped in points
        ],
    )
