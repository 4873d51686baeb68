"""Rows of the tables `tokens` and `domains`, from the values of a step and the names of domains."""

from collections.abc import Sequence

import numpy as np

from geodiag.hooks.measure.step_values import TRACED_EXPERTS, TRACED_IDS, TRACED_TOKENS
from geodiag.hooks.record.table_rows import Columns, Host, Places


def token_rows(host: Host, places: Places) -> Columns | None:
    """Return one row a traced token and site; experts, margin and flips in the router's rows."""
    streams = {name: host[f"tokens.{name}"] for name in _STREAMS if f"tokens.{name}" in host}
    if not streams:
        return None
    sites, traced = next(iter(streams.values())).shape

    def each(values: np.ndarray) -> list:
        return np.tile(values.astype(np.int64), sites).tolist()

    columns: Columns = {
        "token": each(host[TRACED_TOKENS]),
        "token_id": each(host[TRACED_IDS]) if TRACED_IDS in host else None,
        "layer": np.repeat(places.layer_S, traced),
        "site": [s for s in places.site_S for _ in range(traced)],
        **{name: values.ravel() for name, values in streams.items()},
    }
    if TRACED_EXPERTS in host:
        experts: list[list[list[int]] | list[None]] = [[None] * traced for _ in range(sites)]
        for row, chosen in zip(places.router_rows, host[TRACED_EXPERTS], strict=True):
            if not np.isnan(chosen).any():
                experts[row] = chosen.astype(np.int64).tolist()
        columns["experts"] = [e for site in experts for e in site]
    for name in ("margin", "flipped"):
        if f"tokens.{name}" in host:
            at_router = np.ma.masked_all((sites, traced), np.float32)
            at_router[places.router_rows] = np.ma.masked_invalid(host[f"tokens.{name}"])
            columns[name] = at_router.ravel()
    return columns


_STREAMS = ("norm", "projection_1", "projection_2")
"""Metrics of a traced token at every site; the others are a router's."""


def domain_rows(
    host: Host, of_batch: Sequence[str] | None, of_probe: Sequence[str] | None
) -> Columns | None:
    """Return one row a domain: loss and tokens of the step's sequences, flips and clamp hits of the
    probe's.

    of_batch, of_probe: the domain of each sequence. All sequences of a step have the same length.
    """
    columns: dict[str, dict[str, float]] = {}
    if of_batch is not None and "domains.loss" in host:
        columns["loss"] = _means(of_batch, host["domains.loss"])
        if "steps.tokens" in host:
            each = float(host["steps.tokens"][0]) / len(of_batch)
            columns["tokens"] = {d: each * of_batch.count(d) for d in set(of_batch)}
    for name in ("flip_rate", "clamp_gate_rate"):
        if of_probe is not None and f"domains.{name}" in host:
            columns[name] = _means(of_probe, host[f"domains.{name}"])
    if not columns:
        return None
    domains = sorted({d for values in columns.values() for d in values})
    return {"domain": domains} | {
        n: [values.get(d) for d in domains] for n, values in columns.items()
    }


def _means(domains: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Return the mean over each domain's sequences. Raises ValueError if the lengths differ."""
    if len(domains) != len(values):
        raise ValueError(
            f"{len(domains)} domains are named for {len(values)} sequences; name one a sequence"
        )
    named = np.array(domains)
    return {str(d): float(np.mean(values[named == d], dtype=np.float64)) for d in np.unique(named)}
