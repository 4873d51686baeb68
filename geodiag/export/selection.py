"""Selection of what is exported: tables, columns, steps, attempts, from the options or defaults."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from geodiag.errors import GeodiagError
from geodiag.metrics.schema import METRICS, SCHEMAS, metrics_of
from geodiag.store.reader import Steps

_TABLES = {
    "csv": {"all": tuple(SCHEMAS), "default": tuple(SCHEMAS)},
    "tensorboard": {
        "all": ("steps", "layers", "experts", "tokens", "domains", "events"),
        "default": ("steps", "layers", "domains", "events"),
    },
}
"""Matrices are no curves. Experts and tokens are too many curves for a default."""
_METRIC_NAMES = tuple(dict.fromkeys(name for _, name in METRICS))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is exported, after all defaults."""

    tables: dict[str, list[str]]
    """Table → its columns: the keys and the metrics."""
    steps: Steps
    attempt: int | Literal["newest", "all"]
    ranks: Literal["merged", "each"]
    places: Literal["summary", "all"]
    """Curves of layers, experts and tokens: worst and mean over places, or one a place."""
    left_out: list[str]
    """Tables that could have been exported too."""
    asked: bool
    """Whether the tables were named: then an empty table becomes a CSV with a header only."""


def choose(
    to: str,
    *,
    tables: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    steps: str | None = None,
    attempt: str = "newest",
    ranks: Literal["merged", "each"] = "merged",
    places: Literal["summary", "all"] | None = None,
) -> Choice:
    """Return the selection for options of the command line.

    If metrics are named, every place is exported; of all metrics, that would be too many curves.
    Raises GeodiagError for a name that does not exist.
    """
    if to == "csv" and places is not None:
        raise GeodiagError(
            "--places is about curves, a CSV has every place; "
            "leave it out, or pass --to tensorboard"
        )
    possible = _TABLES[to]["all"]
    named = _named_tables(to, tables, possible)
    wanted = _named_metrics(metrics)
    if wanted is None:
        chosen: Iterable[str] = named or _TABLES[to]["default"]
    else:
        chosen = named or _tables_with(wanted, possible, _TABLES[to]["default"])
    columns = {t: _columns(t, wanted) for t in SCHEMAS if t in set(chosen)}
    return Choice(
        tables=columns,
        steps=parse_steps(steps),
        attempt=_attempt(attempt),
        ranks=ranks,
        places=places or ("summary" if metrics is None else "all"),
        left_out=[t for t in possible if t not in columns],
        asked=named is not None,
    )


def parse_steps(text: str | None) -> Steps:
    """Parse `A:B`, A ≤ step < B; either end may be left out."""
    if text is None:
        return None, None
    low, colon, high = (piece.strip() for piece in text.partition(":"))
    if not colon or not all(end.isdecimal() or not end for end in (low, high)):
        raise GeodiagError(
            f"--steps {text} names no steps; pass A:B for A ≤ step < B, e.g. 100:200 or 100:"
        )
    first, end = (int(e) if e else None for e in (low, high))
    if first is not None and end is not None and first >= end:
        raise GeodiagError(
            f"--steps {text} holds no step: it ends where it begins, or earlier; "
            "pass A:B with A < B"
        )
    return first, end


def words(given: Sequence[str] | None) -> list[str] | None:
    """Split names that are repeated or separated by commas."""
    names = [n.strip() for text in given or () for n in text.split(",") if n.strip()]
    return names or None


def keys_of(table: str) -> list[str]:
    """Return the columns of a table that are not metrics."""
    return [n for n in SCHEMAS[table].names if (table, n) not in METRICS]


def _named_tables(
    to: str, given: Sequence[str] | None, possible: Sequence[str]
) -> list[str] | None:
    names = words(given)
    for name in names or ():
        if name not in SCHEMAS:
            raise GeodiagError(
                f"there is no table {name!r}; {_near(name, list(SCHEMAS), 'tables are ')}"
            )
        if name not in possible:
            raise GeodiagError(
                f"{to} has no curves for the table {name}; pass --to csv for that one"
            )
    return names


def _named_metrics(given: Sequence[str] | None) -> list[str] | None:
    patterns = words(given)
    if patterns is None:
        return None
    found: list[str] = []
    for pattern in patterns:
        fit = [n for n in _METRIC_NAMES if fnmatchcase(n, pattern)]
        if not fit:
            hint = _near(
                pattern.strip("*"), list(_METRIC_NAMES), "docs/metrics.md lists them", listed=False
            )
            raise GeodiagError(f"no metric is called {pattern!r}; {hint}")
        found += fit
    return list(dict.fromkeys(found))


def _near(name: str, names: list[str], otherwise: str, listed: bool = True) -> str:
    close = difflib.get_close_matches(name, names, 3, 0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return otherwise + (", ".join(names) if listed else "")


def _tables_with(metrics: list[str], possible: Sequence[str], default: Sequence[str]) -> set[str]:
    """Return the tables that have the metrics; of several, those that are exported by default."""
    found: set[str] = set()
    for name in metrics:
        having = [t for t in possible if (t, name) in METRICS]
        found |= {t for t in having if t in default} or set(having)
    return found


def _columns(table: str, metrics: list[str] | None) -> list[str]:
    if metrics is None or not metrics_of(table):
        return list(SCHEMAS[table].names)
    wanted = [m.name for m in metrics_of(table) if m.name in metrics]
    if not wanted:
        raise GeodiagError(
            f"table {table} records none of {', '.join(metrics)}; leave it out of --tables"
        )
    return keys_of(table) + wanted


def _attempt(text: str) -> Any:
    if text in ("newest", "all"):
        return text
    if not text.isdecimal():
        raise GeodiagError(f"there is no attempt {text!r}; pass newest, all, or a number")
    return int(text)
