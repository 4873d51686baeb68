"""Traced tokens down the stack: two projections of each token's streams, coloured by its expert,
flips ringed.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.data.trajectory import Trajectory
from geodiag.dashboard.figures.colours import hues
from geodiag.dashboard.figures.style import Theme, axis, base, empty, faded

_PANEL_PX, _TITLE_PX, _APART = 168, 22, 0.06


def trajectories(
    now: Sequence[Trajectory], usual: Sequence[Trajectory], theme: Theme, nothing: str
) -> go.Figure:
    """One panel a projection; `usual` are the same tokens at a sample from before, drawn faintly."""
    if not now:
        return empty(nothing, theme, 120)
    if not any(np.isfinite(t.projection_P2).any() for t in now):
        return empty("The traced tokens are not finite here.", theme, 120)
    names = max((list(t.place_P) for t in now), key=len)
    inner = _PANEL_PX + _TITLE_PX
    fig = base(theme, inner + 40, hovermode="closest")
    count = 1 + max((int(t.expert_P.max()) for t in now if len(t.expert_P)), default=0)
    palette = hues(max(count, 1), theme.name == "dark")
    ticks = names[:: max(1, -(-len(names) // 8))]
    depth = {
        "type": "category", "categoryorder": "array", "categoryarray": names, "tickvals": ticks,
        "ticktext": [t.split(".")[0] for t in ticks], "showgrid": False, "ticks": "",
    }  # fmt: skip
    for k, n in enumerate(("", "2")):
        left, right = ((1 + _APART) / 2, 1) if k else (0, (1 - _APART) / 2)
        fig.update_layout({
            f"yaxis{n}": axis(theme, domain=(0, _PANEL_PX / inner), anchor=f"x{n}", nticks=5, tickformat=".2~g"),
            f"xaxis{n}": axis(theme, "layer", domain=(left, right), anchor=f"y{n}", **depth),
        })  # fmt: skip
        fig.add_annotation(
            text=f"<b>projection {k + 1}</b>", x=left, y=_PANEL_PX / inner, xref="paper", yref="paper", xanchor="left",
            yanchor="bottom", showarrow=False, font={"size": 11.5, "color": theme.ink}, yshift=3,
        )  # fmt: skip
        _threads(fig, usual, k, n, faded(theme.soft, 0.35))
        _threads(fig, now, k, n, faded(theme.ink, 0.45))
        _beads(fig, now, k, n, palette, theme)
    fig.update_layout(margin={"l": 42, "r": 10, "t": 0, "b": 38})
    return fig


def _threads(fig: go.Figure, tokens: Sequence[Trajectory], k: int, n: str, colour: str) -> None:
    """All tokens as one line that is broken between them."""
    if not tokens:
        return
    x = [place for t in tokens for place in (*t.place_P, None)]
    y = np.concatenate([np.append(t.projection_P2[:, k], np.nan) for t in tokens])
    fig.add_scatter(
        x=x, y=y, xaxis=f"x{n}", yaxis=f"y{n}", mode="lines", line={"color": colour, "width": 1.1},
        hoverinfo="skip", connectgaps=False,
    )  # fmt: skip


def _beads(
    fig: go.Figure,
    tokens: Sequence[Trajectory],
    k: int,
    n: str,
    palette: Sequence[str],
    theme: Theme,
) -> None:
    beads = [
        (t, i, bool(np.nan_to_num(t.flipped_P[i]) > 0))
        for t in tokens
        for i in np.flatnonzero(t.expert_P >= 0).tolist()
    ]
    fig.add_scatter(
        x=[t.place_P[i] for t, i, _ in beads], y=[t.projection_P2[i, k] for t, i, _ in beads],
        xaxis=f"x{n}", yaxis=f"y{n}",
        mode="markers", name="tokens", hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
        marker={
            "size": [10 if flipped else 6 for *_, flipped in beads], "opacity": 1,
            "color": [palette[t.expert_P[i] % len(palette)] for t, i, _ in beads],
            "line": {"width": [2.2 if flipped else 0 for *_, flipped in beads], "color": theme.spike},
        },
        text=[
            f"<b>token {t.token}</b>{t.text} · {t.place_P[i]}<br>expert {t.expert_P[i]}{', flipped' if flipped else ''}"
            for t, i, flipped in beads
        ],
    )  # fmt: skip
