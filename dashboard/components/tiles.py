"""Headline numbers of a run: six tiles, each with an explanation."""

from typing import Any

import numpy as np

from geodiag.dashboard.components.basic import tile
from geodiag.dashboard.components.text import (
    ROUTING,
    factor,
    integer,
    metric,
    metric_help,
    number,
    percent,
)
from geodiag.dashboard.data.grid import Grid, row_name
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.url.live_figures import detected_spikes
from geodiag.events import KINDS
from geodiag.health import SPIKES

COMPOSITES = ("composite_gain_fwd", "composite_gain_bwd")
_HIGH_GAIN = 2.0
"""Composite gain from which the tile has the warning colour.

The truncation error of the Sinkhorn iteration alone stays far below this value.
"""


def tiles(cache: RunCache) -> list:
    """Return the tiles: step, loss, composite gain, flip rate, routing mode, spikes."""
    steps = cache.steps()
    mode = cache.routing_mode()
    some = len(steps["step"]) > 0
    last = int(steps["step"][-1]) if some else None
    loss = float(steps["loss"][-1]) if some else None
    lag = float(steps["routing_lag"][-1]) if some else 0.0
    seconds = steps["step_seconds"][-50:]
    pace = (
        f"{1 / np.nanmean(seconds):.2g} steps per second"
        if some and np.isfinite(seconds).any()
        else ""
    )
    found = [s for s in detected_spikes(cache) if s.kind in SPIKES]
    return [
        tile("step", integer(last), pace, "The newest recorded step."),
        tile(
            "loss",
            number(loss),
            metric("steps", "loss").unit,
            metric_help(metric("steps", "loss")),
            _tone(loss, np.inf),
        ),
        _gain_tile(worst_now(cache, *COMPOSITES)),
        _flip_tile(worst_now(cache, "flip_rate")),
        tile(
            "routing",
            mode,
            f"Δ = {lag:.0f} steps" if lag and lag == lag else "",
            f"{ROUTING[mode]} {metric_help(metric('steps', 'routing_lag'))}",
        ),
        tile(
            "spikes",
            str(len(found)),
            f"last at {integer(found[-1].onset)}" if found else "",
            f"{KINDS['spike'].capitalize()}.",
        ),
    ]


def worst_now(cache: RunCache, *names: str) -> Grid | None:
    """Return the newest values of the metric that has the worst one, None without values."""
    best: tuple[float, Grid] | None = None
    for grid in cache.recent("layers", *names):
        if not grid.rows or not len(grid.steps_S):
            continue
        value_R = grid.at(int(grid.steps_S[-1]))
        if np.isnan(value_R).all():
            continue
        now = Grid(grid.metric, grid.rows, grid.steps_S[-1:], value_R[:, None])
        worst = now.worst()
        if worst and (best is None or worst[0] > best[0]):
            best = (worst[0], now)
    return best[1] if best else None


def _gain_tile(grid: Grid | None) -> Any:
    label = "composite gain now"
    if grid is None:
        return tile(
            label, "–", "no residual maps recorded", metric_help(metric("layers", COMPOSITES[0]))
        )
    value, _, row = grid.worst()  # type: ignore[misc]
    way = "backward" if grid.metric.name.endswith("bwd") else "forward"
    return tile(
        label,
        factor(value),
        f"{way}, at {row_name(row)}",
        metric_help(grid.metric),
        _tone(value, _HIGH_GAIN),
    )


def _flip_tile(grid: Grid | None) -> Any:
    label = "flip rate now"
    if grid is None:
        return tile(label, "–", "no router measured", metric_help(metric("layers", "flip_rate")))
    value, _, row = grid.worst()  # type: ignore[misc]
    return tile(label, percent(value), f"layer {row[0]}", metric_help(grid.metric))


def _tone(value: float | None, high: float) -> str:
    return "alarm" if value is not None and value >= high else ""
