"""Points of curves from rows: (tag, value) pairs of every step, one curve a place, or two over all
places.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from geodiag.export.rows import moments
from geodiag.metrics.schema import METRICS, Metric

MANY = ("layers", "experts", "tokens")
"""Tables with so many places that two curves may summarise all of them."""


class Moment(NamedTuple):
    """One step of one rank and attempt, and the points of the curves there."""

    row: int
    """Its first row in the piece."""
    rank: int
    attempt: int
    step: int
    points: list[tuple[str, float]]


def curves(table: str, rows: pa.Table, summary: bool) -> Iterator[Moment]:
    """Yield the moments of a piece, in order. A null is not a point; a NaN is one."""
    first = moments(rows)
    metrics = [METRICS[table, n] for n in rows.column_names if (table, n) in METRICS]
    if not len(first) or not metrics:
        return
    ends = np.append(first[1:], len(rows))
    if summary and table in MANY:
        tags, values, known = _over_places(table, rows, metrics, first)
        tags_of, spans = [tags] * len(first), [(i, i + 1) for i in range(len(first))]
    else:
        values, known = _columns(rows, metrics)
        tags_of = _tags(table, rows, metrics)
        spans = list(zip(first.tolist(), ends.tolist(), strict=True))
    who = [rows[n].to_numpy()[first].tolist() for n in ("rank", "attempt", "step")]
    for begin, rank, attempt, step, (low, high) in zip(first.tolist(), *who, spans, strict=True):
        points: list[tuple[str, float]] = []
        for i in range(low, high):
            at, row, tag = np.flatnonzero(known[i]).tolist(), values[i].tolist(), tags_of[i]
            points += [(tag[j], row[j]) for j in at]
        yield Moment(begin, rank, attempt, step, points)


def metric_of(tag: str) -> Metric:
    """Return the metric of a curve."""
    table, _, rest = tag.partition("/")
    return METRICS[table, rest.split("/")[0]] if rest else METRICS["steps", tag]


def _columns(rows: pa.Table, metrics: list[Metric]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values, rows × metrics, and whether each was sampled."""
    known = np.column_stack([rows[m.name].is_valid().to_numpy() for m in metrics])
    values = np.column_stack([rows[m.name].to_numpy() for m in metrics])
    return values, known


def _over_places(
    table: str, rows: pa.Table, metrics: list[Metric], first: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the mean over all places of every moment, and the worst of metrics with a bad end.

    A NaN at any place makes both NaN.
    """
    tags, out, known = [], [], []
    for m in metrics:
        there = rows[m.name].is_valid().to_numpy()
        value = rows[m.name].to_numpy().astype(np.float64)
        count = np.add.reduceat(there.astype(np.int64), first)
        if m.worse is not None:
            worst, none, name = (
                (np.maximum, -np.inf, "max") if m.worse == "high" else (np.minimum, np.inf, "min")
            )
            tags.append(f"{table}/{m.name}/{name}")
            out.append(worst.reduceat(np.where(there, value, none), first))
            known.append(count > 0)
        tags.append(f"{table}/{m.name}/mean")
        out.append(np.add.reduceat(np.where(there, value, 0.0), first) / np.maximum(count, 1))
        known.append(count > 0)
    return tags, np.column_stack(out), np.column_stack(known)


def _tags(table: str, rows: pa.Table, metrics: list[Metric]) -> list[list[str]]:
    """Return the tags of the metrics of every row; rows of one place share them."""
    if table == "steps":
        return [[m.name for m in metrics]] * len(rows)
    keys = [n for n in ("token", "domain", "layer", "site", "expert") if n in rows.column_names]
    keys += (
        ["rank"] if table == "tokens" else []
    )  # tokens are traced on each rank by itself, and not merged
    known: dict[tuple[Any, ...], list[str]] = {}
    tags = []
    for place in zip(*(rows[k].to_pylist() for k in keys), strict=True):
        if place not in known:
            where = _place(dict(zip(keys, place, strict=True)))
            known[place] = [f"{table}/{m.name}/{where}" for m in metrics]
        tags.append(known[place])
    return tags


def _place(keys: dict[str, Any]) -> str:
    """Return `layer 03 attn` or `layer 03 expert 005`: zero-padded, so that tags sort."""
    parts = []
    for name, value in keys.items():
        if value is None or (name == "rank" and value == 0):
            continue
        width = {"layer": 2, "expert": 3}.get(name, 0)
        parts.append(str(value) if name in ("domain", "site") else f"{name} {value:0{width}d}")
    return " ".join(parts)
