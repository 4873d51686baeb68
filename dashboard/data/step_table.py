"""Table `steps` with one value per step, ranks merged, and the steps that were replaced later."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geodiag.dashboard.data.grid import merged_values
from geodiag.metrics.schema import ROUTING_MODES, metrics_of
from geodiag.run import Run
from geodiag.store.manifest import known_starts

# S steps, n table rows.


class SupersededSteps(NamedTuple):
    """Steps that a later attempt replaced, after a rollback or a resume."""

    attempt: int
    step_S: np.ndarray
    loss_S: np.ndarray
    grad_norm_S: np.ndarray


def merge_step_rows(rows: pa.Table, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return columns of `steps`, ranks merged: the named metrics, or all and the routing mode."""
    step_n = rows["step"].to_numpy()
    rank_n = rows["rank"].to_numpy()
    steps_S, at_n = np.unique(step_n, return_inverse=True)
    out: dict[str, np.ndarray] = {"step": steps_S}
    ranks, rank_n = np.unique(rank_n, return_inverse=True)
    shape = (len(ranks), len(steps_S))
    for metric in [m for m in metrics_of("steps") if names is None or m.name in names]:
        out[metric.name] = merged_values(rows[metric.name], metric, (rank_n, at_n), shape)
    if names is not None:
        return out
    mode_S = np.full(len(steps_S), -1, np.int8)
    modes = rows["routing_mode"].cast(pa.string()).to_pylist()
    mode_S[at_n] = [ROUTING_MODES.index(n) if n in ROUTING_MODES else -1 for n in modes]
    out["routing_mode"] = mode_S
    return out


def superseded_of(run: Run) -> list[SupersededSteps]:
    """Return the steps that later attempts replaced: one entry per attempt, oldest first."""
    starts = known_starts(run.manifest)
    if len(starts) < 2:
        return []
    rows = run.read_arrow("steps", ["rank", "attempt", "step", "loss", "grad_norm"], attempt="all")
    out = []
    for attempt in sorted(starts):
        first_replaced = min(
            (first for later, first in starts.items() if later > attempt), default=None
        )
        if first_replaced is None:
            continue
        replaced = rows.filter(
            pc.and_(
                pc.equal(rows["attempt"], attempt), pc.greater_equal(rows["step"], first_replaced)
            )
        )
        if len(replaced):
            merged = merge_step_rows(replaced, ("loss", "grad_norm"))
            out.append(
                SupersededSteps(attempt, merged["step"], merged["loss"], merged["grad_norm"])
            )
    return out
