"""The selected layer of a run: the layers to choose from, the default, the series of a layer."""

from collections.abc import Mapping

import numpy as np

from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.figures.lines import Line
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.url_state import View


def layers_of(cache: RunCache) -> list[int]:
    """Return the layers with experts; all recorded layers if no layer has experts."""

    def read() -> list[int]:
        for grid in cache.recent("layers", "max_vio", "stream_rms", back=20):
            if rows := grid.measured().rows:
                return sorted({layer for layer, _ in rows})
        return []

    return cache.memo("layers", read)


def sites_of(cache: RunCache) -> list[tuple[int, int]]:
    """Return all recorded residual sites, in static order."""

    def read() -> list[tuple[int, int]]:
        (grid,) = cache.recent("layers", "stream_rms", back=20)
        return list(grid.rows)

    return cache.memo("sites", read)


def experts_of(cache: RunCache, layer: int) -> int:
    """Return the number of recorded experts of a layer."""
    (grid,) = cache.memo("experts", lambda: cache.recent("experts", "load", back=20))
    return len(grid.of_layer(layer).rows)


def layer_of(cache: RunCache, view: View) -> int:
    """Return the selected layer.

    Without a selection: the layer of the selected site, of the newest event, or the last layer.
    """
    layers = layers_of(cache)
    named = [
        e["layer"]
        for e in reversed(cache.events())
        if e["layer"] is not None and e["kind"] != "problem"
    ]
    for layer in (view.layer, view.site[0] if view.site else None, *named[:1]):
        if layer is not None and (layer in layers or not layers):
            return layer
    return layers[-1] if layers else 0


def layer_shown(library: RunLibrary, pathname: str, view: View) -> str | None:
    """Return the value of the layer list at an address."""
    cache = library.at_address(pathname)
    return str(layer_of(cache, view)) if cache else None


def layer_options(cache: RunCache) -> list[dict]:
    """Return the options of the layer list."""
    return [{"value": str(n), "label": f"layer {n}"} for n in layers_of(cache) or [0]]


def pick_layer(pathname: str, view: View, name: str, point: dict) -> View:
    """Select the layer of the clicked row; ignore a click elsewhere on a chart."""
    site = View.parse(f"?site={point.get('y')}").site
    return view.replaced(layer=site[0], site=site) if site else view


def series(cache: RunCache, layer: int, names: Mapping[str, str]) -> list[Line]:
    """Return one line per metric: the worst site of the layer, for most metrics the only one."""
    lines = []
    for grid in cache.grids("layers", *names):
        value_RS = grid.of_layer(layer).values_RS
        worst = np.fmin if grid.metric.worse == "low" else np.fmax
        value_S = worst.reduce(value_RS, 0) if len(value_RS) else np.full(len(grid.steps_S), np.nan)
        lines.append(Line(names[grid.metric.name], grid.steps_S, value_S))
    return lines
