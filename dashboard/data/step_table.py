"""Table `steps` as the pages see it: one value a step and column, ranks merged, and what later
attempts took back.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geodiag.dashboard.data.grid import merge_ranks, values_of
from geodiag.metrics.schema import METRICS, ROUTING_MODES, metrics_of
from geodiag.run import Run
from geodiag.store.manifest import known_starts

# S steps, n table rows.


class SupersededSteps(NamedTuple):
    """Steps that a later attempt took the place of."""

    attempt: int
    step_S: np.ndarray
    loss_S: np.ndarray
    grad_norm_S: np.ndarray


def merge_step_rows(rows: pa.Table, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Columns of `steps`, ranks merged; all metrics and the routing mode, or the named metrics
    alone.
    """
    step_n, rank_n = rows["step"].to_numpy(), rows["rank"].to_numpy()
    steps_S, at_n = np.unique(step_n, return_inverse=True)
    out: dict[str, np.ndarray] = {"step": steps_S}
    for metric in [m for m in metrics_of("steps") if names is None or m.name in names]:
        value_n, parts = values_of(rows[metric.name], metric), []
        for rank in np.unique(rank_n):
            one_S = np.full(len(steps_S), np.nan, np.float32)
            one_S[at_n[rank_n == rank]] = value_n[rank_n == rank]
            parts.append(one_S)
        out[metric.name] = merge_ranks(parts, METRICS["steps", metric.name], steps_S.shape)
    if names is not None:
        return out
    mode_S = np.full(len(steps_S), -1, np.int8)
    modes = rows["routing_mode"].cast(pa.string()).to_pylist()
    mode_S[at_n] = [ROUTING_MODES.index(n) if n in ROUTING_MODES else -1 for n in modes]
    out["routing_mode"] = mode_S
    return out


def superseded_of(run: Run) -> list[SupersededSteps]:
    """What was rolled back, or lost to a resume: one entry an attempt, oldest first."""
    starts = known_starts(run.manifest)
    if len(starts) < 2:
        return []
    rows = run.read_arrow("steps", ["rank", "attempt", "step", "loss", "grad_norm"], attempt="all")
    out = []
    for attempt in sorted(starts):
        ends = min((first for later, first in starts.items() if later > attempt), default=None)
        if ends is None:
            continue
        gone = rows.filter(
            pc.and_(pc.equal(rows["attempt"], attempt), pc.greater_equal(rows["step"], ends))
        )
        if len(gone):
            merged = merge_step_rows(gone, ("loss", "grad_norm"))
            out.append(
                SupersededSteps(attempt, merged["step"], merged["loss"], merged["grad_norm"])
            )
    return out
