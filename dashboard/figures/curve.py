"""One line over steps, with its gaps and a cross at each value that is not finite."""

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
    """Draw a series on the axis `y`, in `colour` or else in the colour of text.

    A series with fewer points than `few` also gets dots. `hover` replaces the number in the hover
    text, `extra` is appended to it.
    """
    points = downsampled(step_S, value_S)
    number = "%{y:.3p}" if unit == "share" else "%{y:.4g}"
    line: dict[str, Any] = {"color": colour or theme.ink, "width": 1.4}
    fig.add_scatter(
        x=points.x,
        y=points.y,
        yaxis=y,
        mode="lines+markers" if len(points.x) < few else "lines",
        name=name,
        line=line,
        marker={"size": 4},
        connectgaps=False,
        hovertemplate=(hover or number) + extra,
    )
    nonfinite = nonfinite_steps(step_S, value_S)
    if not len(nonfinite):
        return
    finite = points.y[np.isfinite(points.y)]
    fig.add_scatter(
        x=nonfinite,
        y=np.full(len(nonfinite), finite.max() if len(finite) else 1.0),
        yaxis=y,
        mode="markers",
        name=f"{name} not finite",
        marker={"symbol": "x", "size": 8, "color": theme.spike},
        hovertemplate="NaN or infinite" + extra,
    )
