"""One measured line: as few points as show it all, its gaps, and a cross wherever a value was not
finite.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from geodiag.dashboard.figures.downsample import downsampled, nonfinite_steps
from geodiag.dashboard.figures.style import Theme

# S steps.


def draw_curve(
    fig: go.Figure,
    step_S: np.ndarray,
    value_S: np.ndarray,
    theme: Theme,
    *,
    name: str,
    y: str = "y",
    colour: str = "",
    unit: str = "",
    hover: str = "",
    extra: str = "",
    few: int = 2,
) -> None:
    """Draws it on the axis `y`, in ink or in `colour`; fewer points than `few` are dots as well.

    `hover` says a value in other words than its own number, `extra` ends both hover texts.
    """
    points = downsampled(step_S, value_S)
    said = "%{y:.3p}" if unit == "share" else "%{y:.4g}"
    line: dict[str, Any] = {"color": colour or theme.ink, "width": 1.4}
    fig.add_scatter(
        x=points.x, y=points.y, yaxis=y, mode="lines+markers" if len(points.x) < few else "lines", name=name,
        line=line, marker={"size": 4}, connectgaps=False, hovertemplate=(hover or said) + extra,
    )  # fmt: skip
    lost = nonfinite_steps(step_S, value_S)
    if not len(lost):
        return
    finite = points.y[np.isfinite(points.y)]
    fig.add_scatter(
        x=lost, y=np.full(len(lost), finite.max() if len(finite) else 1.0), yaxis=y, mode="markers",
        name=f"{name} not finite", marker={"symbol": "x", "size": 8, "color": theme.spike},
        hovertemplate="NaN or infinite" + extra,
    )  # fmt: skip
