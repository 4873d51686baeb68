"""What is sampled seldom: residual maps and traced tokens, at their newest sample up to a step."""

from functools import reduce

import numpy as np
import pandas as pd
import pyarrow as pa

from geodiag.dashboard.figures.trajectory import Trajectory
from geodiag.dashboard.grid import row_name
from geodiag.dashboard.record import Record
from geodiag.schema import SITES

_NEAR, _FAR = 64, 4096
"""How far back to look for a sample, at first: a table can be large, and samples are rarely far apart."""


def sampled_at(record: Record, table: str, step: int) -> int | None:
    """The newest step up to `step` at which the table has rows."""
    for back in (_NEAR, _FAR, step + 1):
        known = record.run.read_arrow(table, ["step"], steps=(max(0, step + 1 - back), step + 1))["step"]
        if len(known):
            return int(known[-1].as_py())
    return None


def matrices(record: Record, layer: int, site: str, step: int) -> tuple[int, dict[str, np.ndarray]] | None:
    """(step, map → token-mean matrix) of one site."""
    found = _maps_at(record, step)
    if found is None:
        return None
    at, maps = found
    mine = {name: m for (where, name), m in maps.items() if where == (layer, SITES.index(site))}
    return (at, mine) if mine else None


def composites(record: Record, layer: int, step: int) -> tuple[int, list[tuple[str, np.ndarray]]] | None:
    """(step, [(name, N×N)]): the maps of a layer's sites, and the product of all maps from the first site to it."""
    found = _maps_at(record, step)
    if found is None:
        return None
    at, maps = found
    sites = sorted(where for where, name in maps if name == "res" and where[0] <= layer)
    own = [(row_name(s), maps[s, "res"]) for s in sites if s[0] == layer]
    if not own:
        return None
    product = reduce(lambda so_far, s: maps[s, "res"] @ so_far, sites[1:], maps[sites[0], "res"])
    return at, [*own, (f"{row_name(sites[0])} → {row_name(sites[-1])}", product)]


def traced(record: Record, step: int) -> tuple[int, list[Trajectory]] | None:
    """(step, the traced tokens), each with its way through the sites in static order."""
    at = record.memo(("tokens at", step), lambda: sampled_at(record, "tokens", step))
    if at is None:
        return None
    rows = record.memo(("tokens", at), lambda: record.run.read_arrow("tokens", steps=(at, at + 1)))
    return at, _trajectories(rows)


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
                place_P=tuple(f"{layer}.{site}" for layer, site in zip(mine["layer"], mine["site"], strict=True)),
                projection_P2=mine[["projection_1", "projection_2"]].to_numpy(float),
                expert_P=np.array(experts),
                flipped_P=mine["flipped"].to_numpy(float),
                text=f" (id {int(ids.iloc[0])})" if len(ids) else "",
            )
        )
    return out


def _maps_at(record: Record, step: int) -> tuple[int, dict[tuple[tuple[int, int], str], np.ndarray]] | None:
    """(step, ((layer, site index), map) → matrix), ranks averaged."""
    at = record.memo(("matrices at", step), lambda: sampled_at(record, "matrices", step))
    if at is None:
        return None
    return record.memo(("maps", at), lambda: (at, _all_maps(record, at)))


def _all_maps(record: Record, at: int) -> dict[tuple[tuple[int, int], str], np.ndarray]:
    rows = record.run.read_arrow("matrices", steps=(at, at + 1)).to_pandas()
    return {
        ((int(layer), SITES.index(site)), str(name)): _matrix(cells)
        for (layer, site, name), cells in rows.groupby(["layer", "site", "map"], observed=True)
    }


def _matrix(cells: pd.DataFrame) -> np.ndarray:
    i, j = cells["i"].to_numpy(int), cells["j"].to_numpy(int)
    total, count = np.zeros((i.max() + 1, j.max() + 1)), np.zeros((i.max() + 1, j.max() + 1))
    np.add.at(total, (i, j), cells["value"].to_numpy(float))
    np.add.at(count, (i, j), 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
