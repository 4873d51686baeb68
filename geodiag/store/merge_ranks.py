"""Several ranks as one: the rules, for tables (`merge_ranks`) and for arrays (`reduce_over_ranks`).

A value is *sampled* where a rank measured it; a null, or a rank without a row, is not sampled.
`Metric.ranks` names the rule. The same rules hold for `Run.read`, the dashboard and the cascade.

    rule   sampled and finite                        example: ranks 0, 1, 2 → result
    mean   mean over the ranks that sampled          1, null, 3 → 2
    sum    sum over the ranks that sampled           1, null, 3 → 4
    max    largest                                   1, null, 3 → 3
    min    smallest                                  1, null, 3 → 1
    last   value of the first rank that sampled      null, 3, 1 → 3

    every rule                                       example
    no rank sampled: not sampled                     null, null → null
    an infinity wins over finite values              1, inf → inf;  1, -inf → -inf
    of two infinities, the one at the bad end wins   inf, -inf → -inf if low is worse, else inf
    a NaN wins over everything                       1, NaN → NaN;  inf, NaN → NaN

A value that is not finite is never hidden by the healthy values of other ranks, because one broken
rank breaks the training.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geodiag.metrics.metric import Reduction
from geodiag.metrics.schema import METRICS

# R ranks, S slots: whatever the ranks have in common (steps, layers × steps, groups of rows).
# n rows of a table, G groups of rows that differ in their rank only.

KEYS = {
    "steps": (),
    "layers": ("layer", "site"),
    "experts": ("layer", "expert"),
    "matrices": ("layer", "site", "map", "i", "j"),
    "domains": ("domain",),
}
"""Columns that distinguish the rows of one step. Other tables (`events`, `tokens`) are not merged:
their rows are not a rank's share of a common value.
"""

_MAX_LAG = 64
"""Ranks of a running training write at their own pace, up to this many steps apart."""


def reduce_over_ranks(
    values_RS: np.ndarray, rule: Reduction, worse: Literal["high", "low"] | None
) -> np.ma.MaskedArray:
    """Return one value a slot for values of R ranks, by the rules at the top of this module.

    Args:
        values_RS: floats, ranks along the first axis. In a masked array, masked is not sampled; in
            a plain array everything is sampled.
        rule: `Metric.ranks` of the metric.
        worse: `Metric.worse` of the metric, which decides between +inf and -inf.

    Returns a masked array of the same dtype without the first axis; masked is not sampled.
    """
    data_RS = np.ma.getdata(values_RS)
    sampled_RS = ~np.ma.getmaskarray(values_RS)
    if len(data_RS) == 1:
        return np.ma.MaskedArray(data_RS[0], mask=~sampled_RS[0])
    finite_RS = np.isfinite(data_RS) & sampled_RS

    with np.errstate(over="ignore"):  # a sum that float32 cannot hold becomes infinite
        reduced_S = _reduce_finite(data_RS, finite_RS, rule).astype(data_RS.dtype)

    if not np.array_equal(finite_RS, sampled_RS):
        bad_end = -np.inf if worse == "low" else np.inf
        for nonfinite in (-bad_end, bad_end):
            reduced_S[((data_RS == nonfinite) & sampled_RS).any(0)] = nonfinite
        reduced_S[(np.isnan(data_RS) & sampled_RS).any(0)] = np.nan

    return np.ma.MaskedArray(reduced_S, mask=~sampled_RS.any(0))


def _reduce_finite(data_RS: np.ndarray, finite_RS: np.ndarray, rule: Reduction) -> Any:
    """Reduce the finite values alone; a slot without any gets an arbitrary number."""
    where = True if finite_RS.all() else finite_RS
    if rule == "max":
        return np.max(data_RS, axis=0, where=where, initial=-np.inf)
    if rule == "min":
        return np.min(data_RS, axis=0, where=where, initial=np.inf)
    if rule == "last":
        return np.take_along_axis(data_RS, finite_RS.argmax(0)[None], 0)[0]

    total_S = np.sum(data_RS, axis=0, where=where, dtype=np.float64)
    if rule == "mean":
        return total_S / np.maximum(finite_RS.sum(0), 1)
    return total_S


def merge_ranks(rows: pa.Table, table: str) -> pa.Table:
    """Return `rows` with one row where several ranks have one each.

    A metric is reduced by its rule. Of `rank` and `routing_mode`, the first value that is not null
    is kept. `rows` are sorted by rank, attempt and step, and have the columns `key_names(table)`.
    """
    if table not in KEYS or len(pc.unique(rows["rank"])) < 2:
        return rows
    rank_n = np.unique(rows["rank"].to_numpy(), return_inverse=True)[1]
    group_n, groups = _group(rows, rank_n, ["attempt", "step", *KEYS[table]])

    columns: list[Any] = []
    for field in rows.schema:
        column = rows[field.name]
        rule, worse = _rule(table, field.name)
        if rule is None:
            columns.append(_first_known(column, group_n, groups))
            continue
        values_RG = _spread(column, rank_n, group_n, groups)
        reduced_G = reduce_over_ranks(values_RG, rule, worse)
        mask_G = np.ma.getmaskarray(reduced_G)
        columns.append(pa.array(np.ma.getdata(reduced_G), field.type, mask=mask_G))
    return pa.table(columns, schema=rows.schema)


def key_names(table: str) -> list[str]:
    """Return the columns of a table that `merge_ranks` needs."""
    return ["rank", "attempt", "step", *KEYS.get(table, ())]


def incomplete_ranks(steps: pa.Table, world_size: int, running: bool) -> dict[str, str]:
    """Return a problem for each of `world_size` ranks without steps, or with fewer than the others.

    `steps` are rows of the table `steps`, not merged. While the training is `running`, a rank may
    be some steps behind.
    """
    rank_n, step_n = steps["rank"].to_numpy(), steps["step"].to_numpy()
    last_step = {r: int(step_n[rank_n == r].max()) for r in np.unique(rank_n).tolist()}
    if not last_step:
        return {}
    newest = max(last_step.values())
    allowed_lag = _MAX_LAG if running else 0
    problems = {}
    for rank in range(world_size):
        if rank not in last_step:
            problems[f"rank-{rank}"] = "left no steps; only the other ranks are shown"
        elif newest - last_step[rank] > allowed_lag:
            end = last_step[rank]
            problems[f"rank-{rank}"] = f"ends at step {end}; later steps are of the other ranks"
    return problems


def _rule(table: str, name: str) -> tuple[Reduction | None, Literal["high", "low"] | None]:
    """Return rule and bad end of a column; the rule is None for a column that is not a metric."""
    if (table, name) in METRICS:
        metric = METRICS[table, name]
        return metric.ranks, metric.worse
    return ("mean" if name == "value" else None), None


def _group(rows: pa.Table, rank_n: np.ndarray, keys: Sequence[str]) -> tuple[np.ndarray, int]:
    """Return each row's group, and the number of groups.

    Groups are numbered by attempt, then step, then the place of their first row.
    """
    code_n = np.zeros(len(rows), np.int64)
    for name in keys:
        index_n, count = _codes(rows[name])
        code_n = code_n * count + index_n

    # Mostly every rank has the same rows in the same order; then nothing has to be sorted.
    ranks = int(rank_n.max()) + 1
    each, rest = divmod(len(rows), ranks)
    if not rest and (code_n.reshape(ranks, each) == code_n[:each]).all():
        return np.tile(np.arange(each), ranks), each

    _, first_G, group_n = np.unique(code_n, return_index=True, return_inverse=True)
    attempt_G = rows["attempt"].to_numpy()[first_G]
    step_G = rows["step"].to_numpy()[first_G]
    order_G = np.lexsort((first_G, step_G, attempt_G))
    number_G = np.empty_like(order_G)
    number_G[order_G] = np.arange(len(order_G))
    return number_G[group_n], len(order_G)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """Return a column as whole numbers from 0, equal where its values are, and their count."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    encoded = column.unify_dictionaries().combine_chunks()
    count = len(encoded.dictionary)
    indices = encoded.indices
    if indices.null_count:
        indices = pc.fill_null(indices.cast(pa.int64()), count)
    return indices.to_numpy(), count + 1


def _spread(
    column: pa.ChunkedArray, rank_n: np.ndarray, group_n: np.ndarray, groups: int
) -> np.ma.MaskedArray:
    """Return a column as ranks × groups; masked where a rank has no row, or a null."""
    value_n = column.to_numpy()
    values_RG = np.zeros((int(rank_n.max()) + 1, groups), value_n.dtype)
    mask_RG = np.ones(values_RG.shape, bool)
    values_RG[rank_n, group_n] = value_n
    mask_RG[rank_n, group_n] = column.is_null().to_numpy()
    return np.ma.MaskedArray(values_RG, mask=mask_RG)


def _first_known(column: pa.ChunkedArray, group_n: np.ndarray, groups: int) -> pa.ChunkedArray:
    """Return each group's first value that is not null; null where there is none."""
    known_n = np.flatnonzero(column.is_valid().to_numpy())
    row_G = np.full(groups, -1)
    # Of repeated indices numpy keeps the last assignment; reversed, that is the first row.
    row_G[group_n[known_n[::-1]]] = known_n[::-1]
    return column.take(pa.array(row_G, mask=row_G < 0))
