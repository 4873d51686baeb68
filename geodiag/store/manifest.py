"""run.json: what is said of a run as a whole, and where each of its attempts began.

A resumed or rolled-back training writes its steps again, under the next attempt number. Rows of an
attempt that the manifest does not know (its first step was still in flight, or the manifest is
lost) begin where their own first row says.
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
    """The manifest of a training that begins now, after what `old` tells."""
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
    """The first number that no attempt has used; a killed one may have left rows before its first
    step.
    """
    reserved = (
        old.get("attempt") if rank == 0 else None
    )  # the other ranks come after rank 0 reserved theirs
    return 1 + max([*known_starts(old), reserved if isinstance(reserved, int) else -1], default=-1)


def known_starts(manifest: dict[str, Any]) -> dict[int, int]:
    """Attempt → its first step, as far as the manifest says."""
    return {e["attempt"]: e["first_step"] for e in _entries(manifest)}


def all_starts(rows: pa.Table, known: dict[int, int]) -> dict[int, int]:
    """`known`, and for every other attempt among the rows its own first step."""
    lost = set(pc.unique(rows["attempt"]).to_pylist()) - set(known)
    return known | {
        a: pc.min(rows["step"].filter(pc.equal(rows["attempt"], a))).as_py() for a in lost
    }


def recovered(tables: list[pa.Table]) -> dict[str, Any]:
    """The part of a lost manifest that the rows themselves tell: which attempts there were, where
    they began.
    """
    starts: dict[int, int] = {}
    for rows in tables:
        for attempt, first in all_starts(rows, {}).items():
            starts[attempt] = min(first, starts.get(attempt, first))
    return {"attempts": [entry(a, s) for a, s in sorted(starts.items())]}


def entry(attempt: int, first_step: int) -> dict[str, Any]:
    """What the manifest says of one attempt."""
    return {"attempt": attempt, "first_step": first_step, "time": time.time()}


def _entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The attempts on record; what makes no sense is left out."""
    said = manifest.get("attempts")
    dicts = [e for e in said if isinstance(e, dict)] if isinstance(said, list) else []
    return [
        e
        for e in dicts
        if isinstance(e.get("attempt"), int) and isinstance(e.get("first_step"), int)
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("geodiag", "torch", "triton", "numpy", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
