"""Metrics that are sampled rarely: residual maps and traced tokens near a step."""

from functools import reduce

import numpy as np
import pandas as pd
import pyarrow as pa

from geodiag.dashboard.data.grid import row_name
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.data.trajectory import Trajectory
from geodiag.metrics.schema import SITES

_NEAR, _FAR = 64, 4096
"""Steps to search for a sample, first near and then far, because a table can be large."""


def newest_sample(cache: RunCache, table: str, step: int) -> int | None:
    """Return the newest step up to `step` at which the table has rows."""
    for back in (_NEAR, _FAR, step + 1):
        known = cache.run.read_arrow(table, ["step"], steps=(max(0, step + 1 - back), step + 1))[
            "step"
        ]
        if len(known):
            return int(known[-1].as_py())
    return None


def nearest_sample(cache: RunCache, table: str, step: int) -> int | None:
    """Return the first sample from `step` on, else the newest sample before `step`.

    A sample from `step` on is preferred, because it shows the effect of what happened at `step`.
    """
    after = cache.run.read_arrow(table, ["step"], steps=(step, step + _NEAR))["step"]
    return int(after[0].as_py()) if len(after) else newest_sample(cache, table, step)


def site_matrices(
    cache: RunCache, layer: int, site: str, step: int
) -> tuple[int, dict[str, np.ndarray]] | None:
    """Return (step, token-mean matrix of each map) of one site, or None."""
    at = cache.memo(("matrices at", step), lambda: newest_sample(cache, "matrices", step))
    if at is None:
        return None
    maps = _maps_at(cache, at)
    mine = {name: m for (where, name), m in maps.items() if where == (layer, SITES.index(site))}
    return (at, mine) if mine else None


def composite_maps(cache: RunCache, layer: int, at: int) -> list[tuple[str, np.ndarray]]:
    """Return (name, N×N matrix) at a sampled step: the residual maps of a layer and their product.

    The last matrix is the composite map: H_res of all sites from the first to this layer,
    multiplied in the order in which the streams pass them.
    """
    maps = _maps_at(cache, at)
    sites = sorted(where for where, name in maps if name == "res" and where[0] <= layer)
    own = [(row_name(s), maps[s, "res"]) for s in sites if s[0] == layer]
    if not own:
        return []
    product = reduce(lambda product, s: maps[s, "res"] @ product, sites[1:], maps[sites[0], "res"])
    return [*own, (f"{row_name(sites[0])} → {row_name(sites[-1])}", product)]


def token_trajectories(cache: RunCache, at: int) -> list[Trajectory]:
    """Return the path of each traced token through the sites at a sampled step."""
    rows = cache.memo(("tokens", at), lambda: cache.run.read_arrow("tokens", steps=(at, at + 1)))
    return _trajectories(rows)


def _trajectories(rows: pa.Table) -> list[Trajectory]:
    table = rows.to_pandas()
    table["place"] = table["site"].astype(str).map({s: i for i, s in enumerate(SITES)})
    out = []
    for token, mine in table.sort_values(["layer", "place"]).groupby("token"):
        experts = [int(e[0]) if e is not None and len(e) else -1 for e in mine["experts"]]
        ids = mine["token_id"].dropna()
        out.append(
            Trajectory(
                token=int(token),
                place_P=tuple(
                    f"{layer}.{site}"
                    for layer, site in zip(mine["layer"], mine["site"], strict=True)
                ),
                projection_P2=mine[["projection_1", "projection_2"]].to_numpy(float),
                expert_P=np.array(experts),
                flipped_P=mine["flipped"].to_numpy(float),
                text=f" (id {int(ids.iloc[0])})" if len(ids) else "",
            )
        )
    return out


def samples_around(cache: RunCache, table: str, before: int, step: int) -> list[tuple[str, int]]:
    """Return (label, sampled step) of the newest sample before `before` and of one near `step`."""
    key = ("samples around", table, before, step)
    near = cache.memo((*key, "near"), lambda: nearest_sample(cache, table, step))
    past = cache.memo(
        (*key, "past"), lambda: newest_sample(cache, table, before - 1) if before > 0 else None
    )
    out = [("before", past)] if past is not None and near is not None and past < near else []
    return [*out, ("at the cell", near)] if near is not None else []


def _maps_at(cache: RunCache, at: int) -> dict[tuple[tuple[int, int], str], np.ndarray]:
    """Return the matrix of each ((layer, site index), map) at a sampled step, mean over ranks."""
    return cache.memo(("maps", at), lambda: _all_maps(cache, at))


def _all_maps(cache: RunCache, at: int) -> dict[tuple[tuple[int, int], str], np.ndarray]:
    rows = cache.run.read_arrow("matrices", steps=(at, at + 1)).to_pandas()
    return {
        ((int(layer), SITES.index(site)), str(name)): _matrix(cells)
        for (layer, site, name), cells in rows.groupby(["layer", "site", "map"], observed=True)
    }


def _matrix(cells: pd.DataFrame) -> np.ndarray:
    i, j = cells["i"].to_numpy(int), cells["j"].to_numpy(int)
    shape = (i.max() + 1, j.max() + 1)
    total = np.zeros(shape)
    count = np.zeros(shape)
    np.add.at(total, (i, j), cells["value"].to_numpy(float))
    np.add.at(count, (i, j), 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
