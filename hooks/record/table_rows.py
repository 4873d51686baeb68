"""Table rows: the values of a step as rows of `layers`, `experts` and `matrices`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from geodiag.anomaly.metric_roles import SIGNALS, Series
from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.measure.step_values import EXPERT_ELEMENTS
from geodiag.metrics.metric import Metric, Place
from geodiag.metrics.registry import BY_KEY, MATRICES

Host = dict[str, np.ndarray]
Columns = dict[str, Any]
LAYER_KEYS = ("layer", "site")


@dataclass(frozen=True)
class Places:
    """Which rows of the tables the places of a layout have."""

    layer_S: np.ndarray
    site_S: list[str]
    row_of_layer: dict[int, int]
    """The row of a layer's last site: it carries what a layer has once (router, experts, norms)."""
    router_rows: np.ndarray
    expert_rows: np.ndarray
    attention_rows: np.ndarray
    expert_layers: np.ndarray
    streams: int
    watched: tuple[int, ...] | None

    @classmethod
    def of(cls, layout: Layout) -> "Places":
        row_of_layer = {s.layer: i for i, s in enumerate(layout.sites)}
        row_of_attention = {s.layer: i for i, s in enumerate(layout.sites) if s.site == "attn"}
        return cls(
            np.array([s.layer for s in layout.sites]),
            [s.site for s in layout.sites],
            row_of_layer,
            np.array([row_of_layer[r.layer] for r in layout.routers], int),
            np.array([row_of_layer[e.layer] for e in layout.experts], int),
            np.array([row_of_attention[a.layer] for a in layout.attention], int),
            np.array([e.layer for e in layout.experts], int),
            layout.streams,
            layout.watched,
        )

    def rows_of(self, place: Place) -> np.ndarray | None:
        """Return the rows of `layers` that carry values of a kind of place; None for all rows."""
        if place == "site":
            return None
        if place == "layer":
            return np.array(list(self.row_of_layer.values()), int)
        of_place = {
            "router": self.router_rows,
            "experts": self.expert_rows,
            "attention": self.attention_rows,
        }
        return of_place[place]

    def of_watched(self, columns: Columns) -> Columns:
        """Return the rows of the layers that are recorded."""
        if self.watched is None:
            return columns
        keep = np.isin(columns["layer"], self.watched)
        return {name: _kept(value, keep) for name, value in columns.items()}


def _kept(values: Any, keep: np.ndarray) -> Any:
    if isinstance(values, np.ndarray):
        return values[keep]
    return values if values is None else [v for v, k in zip(values, keep, strict=True) if k]


def layer_rows(host: Host, places: Places) -> Columns:
    """Return one row a site. A metric that a place does not have is null there."""
    columns: Columns = {"layer": places.layer_S, "site": places.site_S}
    for metric, value in _of_table("layers", host):
        rows = places.rows_of(metric.place)
        columns[metric.name] = (
            value if rows is None else _scattered(value, rows, len(places.layer_S))
        )
    return columns


def _of_table(table: str, host: Host) -> list[tuple[Metric, np.ndarray]]:
    """Return the values of a table's metrics."""
    return [
        (BY_KEY[key], value)
        for key, value in host.items()
        if key in BY_KEY and BY_KEY[key].table == table
    ]


def _scattered(value: np.ndarray, rows: np.ndarray, size: int) -> np.ma.MaskedArray:
    out = np.ma.masked_all(size, np.float32)
    out[rows] = value
    return out


def hide(columns: Columns, *keys: str) -> None:
    """Leave out metrics that this step could not measure, so that they are null."""
    for key in keys:
        columns.pop(key.rpartition(".")[2], None)


def hide_inapplicable(columns: Columns, layout: Layout, places: Places) -> None:
    """Set metrics to null that do not apply: margins of a hash router, bias metrics without a bias.

    The flips of a hash router stay, and must be 0.
    """
    for router, row in zip(layout.routers, places.router_rows, strict=True):
        names = ["bias_abs_max", "bias_jaccard"] if router.bias() is None else []
        names += (
            ["router_margin_mean", "router_margin_p01", "router_margin_p10"]
            if router.hashed
            else []
        )
        for name in names:
            if name in columns:
                columns[name][row] = np.ma.masked
    for name, values in columns.items():
        if (
            name.startswith("res_logit") and np.isnan(values).all()
        ):  # a model that does not show them
            columns[name] = None
    if "tear_flipped" in columns:  # no token flipped, so there is no mean
        columns["tear_flipped"] = np.ma.masked_where(
            np.isnan(columns["tear_flipped"]), columns["tear_flipped"]
        )


def series_of(key: str, shape: tuple[int, ...], places: Places) -> list[Series]:
    """Return what the values under a key are, one by one, for the search of an origin; nothing for
    values that take no part in it.
    """
    metric = BY_KEY.get(key)
    if metric is None or (metric.table, metric.name) not in SIGNALS:
        return []
    if metric.table == "steps":
        return [Series(metric.name, -1, None)]
    rows = places.rows_of(metric.place)
    at = range(len(places.layer_S)) if rows is None else rows
    if metric.table == "layers":
        return [Series(metric.name, int(places.layer_S[i]), places.site_S[i]) for i in at]
    layers, experts = shape
    return [
        Series(metric.name, int(places.layer_S[at[i]]), "ffn", expert)
        for i in range(layers)
        for expert in range(experts)
    ]


def without_idle_experts(key: str, values: np.ndarray, host: Host) -> np.ndarray:
    """Return the values with NaN for experts without tokens: their activations do not exist."""
    if EXPERT_ELEMENTS not in host or key not in _OF_ACTIVATIONS:
        return values
    return np.where(host[EXPERT_ELEMENTS] == 0, np.nan, values)


_OF_ACTIVATIONS = ("experts.act_rms", "experts.act_amax")
"""An expert without tokens has none of these."""


def expert_rows(host: Host, places: Places) -> Columns | None:
    """Return one row an expert. An expert without tokens has no activation and no curvature."""
    found = _of_table("experts", host)
    if not found:
        return None
    layers, experts = found[0][1].shape
    columns: Columns = {}
    for m, value in found:
        columns[m.name] = value.ravel()
        if m.key in _OF_ACTIVATIONS and EXPERT_ELEMENTS in host:
            idle = host[EXPERT_ELEMENTS].ravel() == 0
            columns[m.name] = np.ma.masked_array(value.ravel(), idle)
        if m.group == "curvature":
            columns[m.name] = np.ma.masked_where(np.isnan(value.ravel()), value.ravel())
    return {
        "layer": np.repeat(places.expert_layers, experts),
        "expert": np.tile(np.arange(experts), layers),
        **columns,
    }


def matrix_rows(host: Host, places: Places) -> Columns | None:
    """Return the token means of H_pre, H_post and H_res of every site, one row an entry.

    Maps that a model does not expose are left out.
    """
    if MATRICES not in host:
        return None
    n, maps = places.streams, host[MATRICES]
    kinds = ["pre"] * n + ["post"] * n + ["res"] * (n * n)
    i = [0] * n + list(range(n)) + [a for a in range(n) for _ in range(n)]
    j = list(range(n)) + [0] * n + [b for _ in range(n) for b in range(n)]
    known = np.array([k != "pre" or not np.isnan(maps[:, :n]).all() for k in kinds])
    sites = len(maps)
    pick = np.flatnonzero(known)
    return {
        "layer": np.repeat(places.layer_S, len(pick)),
        "site": [s for s in places.site_S for _ in pick],
        "map": [kinds[p] for p in pick] * sites,
        "i": np.tile(np.array(i)[pick], sites),
        "j": np.tile(np.array(j)[pick], sites),
        "value": maps[:, pick].ravel(),
    }
