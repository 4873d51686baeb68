"""run.json, the manifest: a run's configuration and status, and the first step of each attempt.

A resumed or rolled-back training writes its steps again, under the next attempt number. An attempt
that is not in the manifest (its first step was being written, or the manifest is lost) begins at
the first step among its rows.
"""

import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from geodiag.metrics.schema import SCHEMA_VERSION, registry


def begin(
    old: dict[str, Any],
    attempt: int,
    found: Mapping[str, Any],
    config: Mapping[str, Any],
    counterfactual: Sequence[str],
    world_size: int,
) -> dict[str, Any]:
    """Return the manifest of a training that begins now; `old` is the manifest before it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": old.get("created", time.time()),
        "status": "running",
        "last_step": old.get("last_step"),
        "attempt": attempt,
        "attempts": _entries(old),
        "found": dict(found),
        "config": dict(config),
        "world_size": world_size,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": _versions(),
        "registry": registry(counterfactual),
    }


def next_attempt(old: dict[str, Any], rank: int) -> int:
    """Return the first attempt number that is not used yet.

    An attempt that was killed before its first step has used its number too, because it may have
    left rows. The other ranks read the manifest after rank 0 has reserved the number in it.
    """
    used = list(known_starts(old))
    reserved = old.get("attempt")
    if rank == 0 and isinstance(reserved, int):
        used.append(reserved)
    return 1 + max(used, default=-1)


def known_starts(manifest: dict[str, Any]) -> dict[int, int]:
    """Return the first step of each attempt in the manifest."""
    return {e["attempt"]: e["first_step"] for e in _entries(manifest)}


def all_starts(rows: pa.Table, known: dict[int, int]) -> dict[int, int]:
    """Return `known` plus the first step of every other attempt among the rows."""
    starts = dict(known)
    for attempt in set(pc.unique(rows["attempt"]).to_pylist()) - set(known):
        steps = rows["step"].filter(pc.equal(rows["attempt"], attempt))
        starts[attempt] = pc.min(steps).as_py()
    return starts


def recovered(tables: list[pa.Table]) -> dict[str, Any]:
    """Return the attempts of a lost manifest, found in the rows of all tables."""
    starts: dict[int, int] = {}
    for rows in tables:
        for attempt, first in all_starts(rows, {}).items():
            starts[attempt] = min(first, starts.get(attempt, first))
    return {"attempts": [entry(a, s) for a, s in sorted(starts.items())]}


def entry(attempt: int, first_step: int) -> dict[str, Any]:
    """Return the manifest's entry of one attempt that begins now."""
    return {"attempt": attempt, "first_step": first_step, "time": time.time()}


def _entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the valid entries of `attempts`."""
    entries = manifest.get("attempts")
    return [e for e in entries if _is_entry(e)] if isinstance(entries, list) else []


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    return isinstance(entry.get("attempt"), int) and isinstance(entry.get("first_step"), int)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("geodiag", "torch", "triton", "numpy", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
