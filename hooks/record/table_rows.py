"""From a step's host values to the rows of its tables."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from geodiag.anomaly.metric_roles import SIGNALS, Series
from geodiag.hooks.adapters.base import Layout
from geodiag.metrics.schema import METRICS

Host = dict[str, np.ndarray]
Columns = dict[str, Any]
LAYER_KEYS = ("layer", "site")


@dataclass(frozen=True)
class Places:
    """Where the rows of a layout's tables stand."""

    layer_S: np.ndarray
    site_S: list[str]
    row_of_layer: dict[int, int]
    """The layer's last site: the row that carries what a layer has once (router, experts, gradient
    norm).
    """
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

    def of_watched(self, columns: Columns) -> Columns:
        """The rows of the layers that are recorded."""
        if self.watched is None:
            return columns
        keep = np.isin(columns["layer"], self.watched)
        return {name: _kept(value, keep) for name, value in columns.items()}


def _kept(values: Any, keep: np.ndarray) -> Any:
    if isinstance(values, np.ndarray):
        return values[keep]
    return values if values is None else [v for v, k in zip(values, keep, strict=True) if k]


def layer_rows(host: Host, places: Places) -> Columns:
    """One row a site. A metric that a place does not have is null there."""
    sites = len(places.layer_S)
    columns: Columns = {"layer": places.layer_S, "site": places.site_S}
    rows_of = {
        "router": places.router_rows,
        "act": places.expert_rows,
        "attn": places.attention_rows,
    }
    for key, value in host.items():
        group, _, name = key.partition("/")
        if ("layers", name) not in METRICS:
            continue
        if group == "site":
            columns[name] = value
        elif group in rows_of:
            columns[name] = _scattered(value, rows_of[group], sites)
        elif group == "layer":
            rows = np.array([places.row_of_layer[i] for i in range(len(value))])
            columns[name] = _scattered(value, rows, sites)
    return columns


def _scattered(value: np.ndarray, rows: np.ndarray, size: int) -> np.ma.MaskedArray:
    out = np.ma.masked_all(size, np.float32)
    out[rows] = value
    return out


def hide(columns: Columns, *names: str) -> None:
    """Leaves out metrics that this step could not measure, so that they read as null."""
    for name in names:
        columns.pop(name, None)


def hide_inapplicable(columns: Columns, layout: Layout, places: Places) -> None:
    """A hash router chooses nothing: no margin, no overlap; its flips stay, and must be 0. No bias,
    no bias metrics.
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
    if "tear_flipped" in columns:  # no token flipped: there is nothing to average over
        columns["tear_flipped"] = np.ma.masked_where(
            np.isnan(columns["tear_flipped"]), columns["tear_flipped"]
        )


def series_of(key: str, shape: tuple[int, ...], places: Places) -> list[Series]:
    """What the values under a host key are, one by one; nothing where they say nothing about an
    origin.
    """
    group, _, name = key.rpartition("/")
    if group == "" and ("steps", name) in SIGNALS:
        return [Series(name, -1, None)]
    at = {
        "site": np.arange(len(places.layer_S)),
        "router": places.router_rows,
        "act": places.expert_rows,
    }
    at["attn"] = places.attention_rows
    at["layer"] = np.array(list(places.row_of_layer.values()), int)
    if ("layers", name) in SIGNALS and group in at:
        return [Series(name, int(places.layer_S[i]), places.site_S[i]) for i in at[group]]
    if ("experts", name) in SIGNALS and group in ("", "expert"):
        rows = places.router_rows if group == "" else places.expert_rows
        layers, experts = shape
        return [
            Series(name, int(places.layer_S[rows[i]]), "ffn", e)
            for i in range(layers)
            for e in range(experts)
        ]
    return []


_OF_EXPERTS = {
    "load": "load",
    "gate_mass": "gate_mass",
    "expert/act_rms": "act_rms",
    "expert/act_amax": "act_amax",
    "expert/clamp_hits": "clamp_hits",
    "expert/curvature": "curvature",
}


def expert_rows(host: Host, places: Places) -> Columns | None:
    """One row an expert. An expert that saw no token has no activation, and no curvature."""
    columns = {name: host[key] for key, name in _OF_EXPERTS.items() if key in host}
    if not columns:
        return None
    layers, experts = next(iter(columns.values())).shape
    if "expert/elements" in host:
        idle = host["expert/elements"] == 0
        columns |= {
            n: np.ma.masked_array(columns[n], idle) for n in ("act_rms", "act_amax") if n in columns
        }
    if "curvature" in columns:
        columns["curvature"] = np.ma.masked_where(
            np.isnan(columns["curvature"]), columns["curvature"]
        )
    return {
        "layer": np.repeat(places.expert_layers, experts),
        "expert": np.tile(np.arange(experts), layers),
        **{name: values.ravel() for name, values in columns.items()},
    }


def matrix_rows(host: Host, places: Places) -> Columns | None:
    """Token-mean H_pre, H_post and H_res of every site, one row an entry; what a model does not
    expose is left out.
    """
    if "maps" not in host:
        return None
    n, maps = places.streams, host["maps"]
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
