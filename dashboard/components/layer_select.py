"""Choosing one layer of a run: which there are, which is meant, and its series."""

from collections.abc import Mapping

import numpy as np

from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.figures.lines import Line
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.url_state import View


def layers_of(cache: RunCache) -> list[int]:
    """The layers that have experts; where none has, every layer on record."""

    def read() -> list[int]:
        for grid in cache.recent("layers", "max_vio", "stream_rms", back=20):
            if rows := grid.measured().rows:
                return sorted({layer for layer, _ in rows})
        return []

    return cache.memo("layers", read)


def sites_of(cache: RunCache) -> list[tuple[int, int]]:
    """Every residual site on record, in static order."""

    def read() -> list[tuple[int, int]]:
        (grid,) = cache.recent("layers", "stream_rms", back=20)
        return list(grid.rows)

    return cache.memo("sites", read)


def experts_of(cache: RunCache, layer: int) -> int:
    """How many experts a layer has on record."""
    (grid,) = cache.memo("experts", lambda: cache.recent("experts", "load", back=20))
    return len(grid.of_layer(layer).rows)


def layer_of(cache: RunCache, view: View) -> int:
    """The chosen layer; else that of the chosen site, of the latest spike's first suspect, or the
    deepest one.
    """
    there = layers_of(cache)
    named = [
        e["layer"]
        for e in reversed(cache.events())
        if e["layer"] is not None and e["kind"] != "problem"
    ]
    for layer in (view.layer, view.site[0] if view.site else None, *named[:1]):
        if layer is not None and (layer in there or not there):
            return layer
    return there[-1] if there else 0


def layer_shown(library: RunLibrary, pathname: str, view: View) -> str | None:
    """What the choice of layers shows at an address."""
    cache = library.at_address(pathname)
    return str(layer_of(cache, view)) if cache else None


def layer_options(cache: RunCache) -> list[dict]:
    return [{"value": str(n), "label": f"layer {n}"} for n in layers_of(cache) or [0]]


def pick_layer(pathname: str, view: View, name: str, point: dict) -> View:
    """A click on a row of layers chooses the layer; a click elsewhere on a chart, nothing."""
    site = View.parse(f"?site={point.get('y')}").site
    return view.replaced(layer=site[0], site=site) if site else view


def series(cache: RunCache, layer: int, names: Mapping[str, str]) -> list[Line]:
    """One line a metric: the layer's worst site, which for most metrics is its only one."""
    lines = []
    for grid in cache.grids("layers", *names):
        value_RS = grid.of_layer(layer).values_RS
        worst = np.fmin if grid.metric.worse == "low" else np.fmax
        value_S = worst.reduce(value_RS, 0) if len(value_RS) else np.full(len(grid.steps_S), np.nan)
        lines.append(Line(names[grid.metric.name], grid.steps_S, value_S))
    return lines
