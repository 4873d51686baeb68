"""Colour axes: gains around 1 on a log scale, shares from 0, wide ranges on a log scale."""

from typing import Any, NamedTuple

import numpy as np

from geodiag.dashboard.figures.style import Theme, ticks_of
from geodiag.metrics.schema import Metric

_LEAST_GAIN = 1.05
"""Smallest end of the colour axis of a gain, so that rounding noise around 1 stays pale."""


class Shade(NamedTuple):
    """A colour axis; with `log`, values enter it as base-10 logarithms."""

    axis: dict[str, Any]
    log: bool


def is_gain(metric: Metric) -> bool:
    """True if a value of 1 means that the input is passed on unchanged."""
    return "gain" in metric.name or metric.name.startswith("spectral_norm_res")


def shade(metric: Metric, values: np.ndarray, theme: Theme, centre: float | None = None) -> Shade:
    """Return the colour axis for values of `metric`; `centre` gets the middle colour."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Shade({"colorscale": theme.heat, "cmin": 0, "cmax": 1, "showscale": False}, False)
    low, high = float(finite.min()), float(finite.max())
    if is_gain(metric) or centre is not None:
        middle = centre or 1.0
        least = _LEAST_GAIN if centre is None else 2.0
        positive = finite[finite > 0] / middle
        reach = (
            max(least, float(positive.max()), 1 / float(positive.min())) if len(positive) else least
        )
        reach = min(reach, max(least, 1e4 if centre is None else 4.0))
        a = np.log10(middle) - np.log10(reach)
        b = np.log10(middle) + np.log10(reach)
        return Shade(
            _axis(theme.gain, float(a), float(b), metric.unit, _ticks(float(a), float(b))), True
        )
    scale = [(1 - p, c) for p, c in reversed(theme.heat)] if metric.worse == "low" else theme.heat
    if low > 0 and high / low > 100:
        a, b = float(np.log10(low)), float(np.log10(high))
        return Shade(_axis(scale, a, b, metric.unit, _ticks(a, b)), True)
    if metric.unit == "share":
        low = min(low, 0.0)
    # Noise stays pale: only values that at least double use the full range of colours.
    high = max(high, 2 * low, low + 1e-9) if metric.worse != "low" else max(high, low + 1e-9)
    return Shade(_axis(scale, low, high, metric.unit, None), False)


Z_MIN, Z_MAX = 3.0, 60.0
"""Ends of the colour axis of robust z.

The worst of many layers reaches 3 by noise alone. The axis is logarithmic, so that both a weak
start and an extreme score are visible.
"""


def z_shade(score: np.ndarray) -> np.ndarray:
    """Return scores as values on the colour axis `robust_z`; infinity becomes its upper end."""
    return np.log10(np.clip(np.where(np.isinf(score), Z_MAX, score), Z_MIN / 2, None))


def robust_z(theme: Theme, length: float) -> dict[str, Any]:
    """Return the colour axis of stage scores; `length` is the height of its bar, as a share."""
    bar = {
        "len": length,
        "y": 0,
        "yanchor": "bottom",
        "thickness": 10,
        "outlinewidth": 0,
        "x": 1.01,
        "title": {"text": "robust z", "font": {"size": 11}},
        "tickfont": {"size": 11},
        "tickvals": np.log10([3, 6, 12, 24, 48]).tolist(),
        "ticktext": ["≤ 3", "6", "12", "24", "48"],
    }
    return {
        "colorscale": theme.heat,
        "cmin": float(np.log10(Z_MIN)),
        "cmax": float(np.log10(Z_MAX)),
        "colorbar": bar,
    }


def _axis(
    scale: Any, low: float, high: float, unit: str, ticks: list[float] | None
) -> dict[str, Any]:
    bar: dict[str, Any] = {
        "thickness": 10,
        "outlinewidth": 0,
        "tickfont": {"size": 11},
        "x": 1.01,
        "nticks": 6,
    }
    share = unit == "share"
    gain = unit == "×"
    bar["title"] = {"text": "" if share or gain or unit == "1" else unit, "font": {"size": 12}}
    if ticks is not None:
        text = [f"{100 * t:.4g}%" if share else f"×{t:.4g}" if gain else f"{t:.4g}" for t in ticks]
        bar |= {"tickvals": [float(np.log10(t)) for t in ticks], "ticktext": text}
    else:
        bar |= {"tickformat": ticks_of(unit), "tickprefix": "×" if gain else ""}
    return {"colorscale": scale, "cmin": low, "cmax": high, "colorbar": bar}


_ROUND: tuple[tuple[float, ...], ...] = (
    (1,),
    (2, 5),
    (1.5, 3, 7),
    (1.2, 8),
    (1.1, 9),
    (1.05, 9.5),
    (1.02, 9.8),
)
"""Mantissas of tick values, the roundest first."""
_MOST_TICKS = 9


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between 10^low and 10^high that are not too close to each other."""
    picked: list[float] = []
    decades = range(int(np.floor(low)) - 1, int(np.ceil(high)) + 1)
    for mantissas in _ROUND:
        for at in sorted(float(np.log10(m)) + e for m in mantissas for e in decades):
            apart = min((abs(at - c) for c in picked), default=high - low)
            if low <= at <= high and apart > (high - low) / 14 and len(picked) < _MOST_TICKS:
                picked.append(at)
    return sorted(float(f"{10**at:.3g}") for at in picked)
