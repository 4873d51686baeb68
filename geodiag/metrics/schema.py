"""Arrow schema of every table of a run directory.

Its columns are the keys of the table, then its metrics from the registry. A null in a table means
"not sampled" or "not applicable"; a NaN is a measured NaN.
"""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from geodiag.metrics.metric import Metric
from geodiag.metrics.registry import METRICS

SCHEMA_VERSION = 2
"""2: tables `tokens` and `domains`, and the probes' columns. A run of an earlier version reads as
if they were null.
"""

SITES = ("attn", "ffn", "block")
ROUTING_MODES = ("off", "warmup", "on", "drain")
MAPS = ("pre", "post", "res")

_RANKED = [("rank", pa.int16()), ("attempt", pa.int16()), ("step", pa.int32())]
_SITE = pa.dictionary(pa.int8(), pa.string())
_KEYS = {
    "steps": [("routing_mode", pa.dictionary(pa.int8(), pa.string()))],
    "layers": [("layer", pa.int16()), ("site", _SITE)],
    "experts": [("layer", pa.int16()), ("expert", pa.int16())],
    "matrices": [
        ("layer", pa.int16()),
        ("site", _SITE),
        ("map", pa.dictionary(pa.int8(), pa.string())),
        ("i", pa.int8()),
        ("j", pa.int8()),
        ("value", pa.float32()),
    ],
    "tokens": [
        ("token", pa.int32()),
        ("token_id", pa.int32()),
        ("layer", pa.int16()),
        ("site", _SITE),
        ("experts", pa.list_(pa.int16())),
    ],
    "domains": [("domain", pa.string())],
    "events": [
        ("kind", pa.string()),
        ("layer", pa.int16()),
        ("site", pa.string()),
        ("expert", pa.int16()),
        ("message", pa.string()),
        ("data", pa.string()),
        ("time", pa.float64()),
    ],
}

CATEGORIES = {"routing_mode": ROUTING_MODES, "site": SITES, "map": MAPS}
"""Fixed dictionaries of the dictionary-encoded columns, so that every batch carries the same one.
"""


def metrics_of(table: str) -> list[Metric]:
    """The registered metrics of one table, in catalogue order."""
    return [m for (t, _), m in METRICS.items() if t == table]


SCHEMAS: dict[str, pa.Schema] = {
    table: pa.schema(
        [pa.field(n, t, nullable=n not in ("rank", "attempt", "step")) for n, t in _RANKED + keys]
        + [pa.field(m.name, pa.float32()) for m in metrics_of(table)]
    )
    for table, keys in _KEYS.items()
}
"""Table → Arrow schema: rank, attempt, step, the table's keys, then its metrics as float32."""


_DESCRIBED = (
    "name",
    "table",
    "unit",
    "micro",
    "ranks",
    "every",
    "healthy",
    "worse",
    "stage",
    "help",
    "source",
)


def registry(counterfactual: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Return the description of every metric for run.json; `counterfactual` ones are marked."""
    marked = set(counterfactual)
    return [
        {field: getattr(m, field) for field in _DESCRIBED} | {"counterfactual": m.name in marked}
        for m in METRICS.values()
    ]
