"""Rows of traced tokens and of domains, from a step's host values and what the host knows of names."""

from collections.abc import Sequence

import numpy as np

from geodiag.hooks.record.table_rows import Columns, Host, Places


def token_rows(host: Host, places: Places) -> Columns | None:
    """One row a traced token and site. Experts, margin and flips stand where the layer's router
    does.
    """
    if "trace/streams" not in host:
        return None
    streams = host["trace/streams"]  # (site, token, [norm, projection, projection])
    sites, traced = streams.shape[:2]

    def each(values: np.ndarray) -> list:
        return np.tile(values.astype(np.int64), sites).tolist()

    columns: Columns = {
        "token": each(host["trace/token"]),
        "token_id": each(host["trace/token_id"]) if "trace/token_id" in host else None,
        "layer": np.repeat(places.layer_S, traced),
        "site": [s for s in places.site_S for _ in range(traced)],
        **dict(
            zip(("norm", "projection_1", "projection_2"), streams.reshape(-1, 3).T, strict=True)
        ),
    }
    if "trace/experts" in host:
        experts: list[list[list[int]] | list[None]] = [[None] * traced for _ in range(sites)]
        for row, chosen in zip(places.router_rows, host["trace/experts"], strict=True):
            if not np.isnan(chosen).any():
                experts[row] = chosen.astype(np.int64).tolist()
        columns["experts"] = [e for site in experts for e in site]
    for name in ("margin", "flipped"):
        if f"trace/{name}" in host:
            at_router = np.ma.masked_all((sites, traced), np.float32)
            at_router[places.router_rows] = np.ma.masked_invalid(host[f"trace/{name}"])
            columns[name] = at_router.ravel()
    return columns


def domain_rows(
    host: Host, of_batch: Sequence[str] | None, of_probe: Sequence[str] | None
) -> Columns | None:
    """One row a domain: loss and tokens of the step's sequences, flips and clamp hits of the
    probe's.

    of_batch, of_probe: the domain of each sequence. The step's tokens are spread evenly over its
    sequences.
    """
    columns: dict[str, dict[str, float]] = {}
    if of_batch is not None and "domain/loss" in host:
        columns["loss"] = _means(of_batch, host["domain/loss"])
        if "tokens" in host:
            each = float(host["tokens"][0]) / len(of_batch)
            columns["tokens"] = {d: each * of_batch.count(d) for d in set(of_batch)}
    for name in ("flip_rate", "clamp_gate_rate"):
        if of_probe is not None and f"probe/{name}" in host:
            columns[name] = _means(of_probe, host[f"probe/{name}"])
    if not columns:
        return None
    domains = sorted({d for values in columns.values() for d in values})
    return {"domain": domains} | {
        n: [values.get(d) for d in domains] for n, values in columns.items()
    }


def _means(domains: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Mean over the sequences of each domain. ValueError where names and values do not belong
    together.
    """
    if len(domains) != len(values):
        raise ValueError(
            f"{len(domains)} domains are named for {len(values)} sequences; name one a sequence"
        )
    named = np.array(domains)
    return {str(d): float(np.mean(values[named == d], dtype=np.float64)) for d in np.unique(named)}
