"""Several ranks' rows as one: what each saw of a step, put together as the registry says."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geodiag.metrics.schema import METRICS

KEYS = {
    "steps": (),
    "layers": ("layer", "site"),
    "experts": ("layer", "expert"),
    "matrices": ("layer", "site", "map", "i", "j"),
    "domains": ("domain",),
}
"""What tells rows of one step apart. Rows of other tables (events, traced tokens) are no rank's
share of anything.
"""
_AGGREGATES = {"mean": "mean", "sum": "sum", "max": "max", "min": "min", "last": "first"}


_APART = 64
"""Ranks of a training that runs write at their own pace; so many steps apart is no longer that."""


def key_names(table: str) -> list[str]:
    """What `merge_ranks` needs of a table's columns."""
    return ["rank", "attempt", "step", *KEYS.get(table, ())]


def too_few(steps: pa.Table, world: int, running: bool) -> dict[str, str]:
    """Ranks of a training of `world` whose steps are missing, or end before the others'; and what
    that means.
    """
    rank, step = steps["rank"].to_numpy(), steps["step"].to_numpy()
    last = {r: int(step[rank == r].max()) for r in np.unique(rank).tolist()}
    if not last:
        return {}
    newest = max(last.values())
    found = {}
    for r in range(world):
        if r not in last:
            found[f"rank-{r}"] = "left no steps; what is shown is of the other ranks"
        elif newest - last[r] > (_APART if running else 0):
            found[f"rank-{r}"] = f"ends at step {last[r]}; later steps are of the other ranks"
    return found


def merge_ranks(rows: pa.Table, table: str) -> pa.Table:
    """`rows` with one row where the ranks have one each, under the rank that comes first.

    Nulls take no part; a NaN that one rank measured is the answer, whatever the others say. `rows`
    lie in the order of their ranks and hold the table's keys.
    """
    ranks = pc.unique(rows["rank"])
    if table not in KEYS or len(ranks) < 2:
        return rows
    keys = ["attempt", "step", *KEYS[table]]
    plain = rows.select(keys)
    for name in keys:
        if pa.types.is_dictionary(plain.schema.field(name).type):
            plain = plain.set_column(
                plain.schema.get_field_index(name), name, plain[name].cast(pa.string())
            )
    wanted = [(n, _rule(table, n)) for n in rows.column_names if n not in keys]
    for name, _ in wanted:
        column = rows[name]
        plain = plain.append_column(
            name, column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
        )
        if pa.types.is_floating(column.type):
            plain = plain.append_column(f"{name}?", pc.is_nan(column))
    asked = [(n, r) for n, r in wanted] + [
        (n, "max") for n in plain.column_names if n.endswith("?")
    ]
    grouped = plain.group_by(keys, use_threads=False).aggregate(asked)
    columns = []
    for field in rows.schema:
        name = field.name if field.name in keys else f"{field.name}_{_rule(table, field.name)}"
        column = grouped[name]
        if f"{field.name}?_max" in grouped.column_names:
            broken = pc.fill_null(grouped[f"{field.name}?_max"], False)
            column = pc.if_else(broken, pa.scalar(np.nan, column.type), column)
        columns.append(column.cast(field.type))
    out = pa.table(columns, schema=rows.schema)
    place = (out["attempt"].to_numpy().astype(np.int64) << 32) + out["step"].to_numpy()
    return out.take(pa.array(np.argsort(place, kind="stable")))


def _rule(table: str, name: str) -> str:
    if (table, name) in METRICS:
        return _AGGREGATES[METRICS[table, name].ranks]
    return "mean" if name == "value" else "first"
