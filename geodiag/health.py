"""Health of a run: the worst value of every metric, and the state of the three stages."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from geodiag.jsonable import jsonable
from geodiag.metrics.schema import METRICS, Metric, metrics_of
from geodiag.run import Run, Status
from geodiag.store.merge_ranks import key_names
from geodiag.store.step_chunks import step_chunks

SPIKES = ("spike", "divergence", "nonfinite")
"""Kinds of events that count as a spike of the run; an outlier is over before one can act."""
ALERT = 6.0
"""A stage's score, in robust z, from which its worst layer is outside its own history."""
PERSISTENCE = 3
"""Steps in a row above `ALERT` that mean a stage has left its history; fewer are one odd batch."""
EXACT = 1e-2
"""How near to 1 the sums of a projected map stay on the side that was normalised last."""
NEAR = 0.1
"""Growth over the whole depth below this counts as none."""


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The worst value of a metric, and its place."""

    value: float
    step: int
    layer: int | None = None
    site: str | None = None
    expert: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields; a value that is not finite is null, and named in `nonfinite`."""
        found = {
            "value": jsonable(self.value),
            "step": self.step,
            "layer": self.layer,
            "site": self.site,
        }
        found |= {} if self.expert is None else {"expert": self.expert}
        return found | ({} if math.isfinite(self.value) else {"nonfinite": str(self.value)})


@dataclass(frozen=True, kw_only=True)
class Composite:
    """Whether the residual maps amplify when composed: the third stage in one word."""

    verdict: Literal["absent", "within", "flat", "grew", "nonfinite"]
    worst: Worst | None
    direction: Literal["forward", "backward"]
    bound: float | None
    """Gain that the truncated projection alone explains; None for maps without a projection."""

    def as_json(self) -> dict[str, Any]:
        worst = self.worst.as_json() if self.worst else None
        return {
            "verdict": self.verdict,
            "direction": self.direction,
            "worst": worst,
            "bound": jsonable(self.bound),
        }


@dataclass(frozen=True, kw_only=True)
class Health:
    """Health of a run, as `geodiag show` and `geodiag runs` print it."""

    run: str
    status: Status
    last_step: int | None
    last_loss: float | None
    spikes: list[dict[str, Any]]
    worst: dict[str, Worst]
    left: dict[int, int | None]
    """Stage → the first step at which it left its own history; None where it never did."""
    composite: Composite
    found: dict[str, int]
    missing: list[str]
    """Parts that this model does not have, as the adapter reported them."""
    problems: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "status": self.status,
            "last_step": self.last_step,
            "loss": jsonable(self.last_loss),
            "spikes": len(self.spikes),
            "spike_events": self.spikes,
            "worst": {name: w.as_json() for name, w in self.worst.items()},
            "stages": {str(stage): {"left": step} for stage, step in self.left.items()},
            "composite": self.composite.as_json(),
            "found": self.found,
            "missing": self.missing,
            "problems": self.problems,
        }


def health(run: Run, names: Collection[str] | None = None) -> Health:
    """Return the health of a run; only the metrics in `names` are read, None for all."""
    steps = run.read_arrow("steps", ranks="merged")
    step_n = steps["step"].to_numpy()
    first, last = (int(step_n.min()), int(step_n.max())) if len(step_n) else (0, 0)
    worst: dict[str, Worst] = {}
    for table in ("steps", "layers", "experts"):
        wanted = [
            m
            for m in metrics_of(table)
            if m.worse and m.name not in worst and (not names or m.name in names)
        ]
        if table == "steps":
            worst |= _worst_in([steps], wanted)
        elif wanted:
            worst |= _worst_in(_pieces(run, table, [m.name for m in wanted], first, last), wanted)
    events = run.read_arrow("events", ["step", "kind", "message"]).to_pylist()
    losses = steps["loss"].drop_null()
    return Health(
        run=run.url,
        status=run.status(),
        last_step=steps["step"][-1].as_py() if len(steps) else None,
        last_loss=losses[-1].as_py() if len(losses) else None,
        spikes=[e for e in events if e["kind"] in SPIKES],
        worst=worst,
        left={stage: _left(steps, stage) for stage in (1, 2, 3)},
        composite=_composite(worst, _pieces(run, "layers", _PROJECTION, first, last)),
        found=_found(run),
        missing=_missing(run),
        problems=dict(run.problems),
    )


def _pieces(
    run: Run, table: str, names: Sequence[str], first: int, last: int
) -> Iterator[pa.Table]:
    """Yield the table's keys and named metrics, one range of steps after another."""
    columns = [*key_names(table), *names]
    for steps in step_chunks(run, table, len(columns), first, last):
        yield run.read_arrow(table, columns, steps, ranks="merged")


def _worst_in(pieces: Iterable[pa.Table], metrics: Sequence[Metric]) -> dict[str, Worst]:
    """Return the worst value of each metric that was measured."""
    worst: dict[str, Worst] = {}
    for rows in pieces:
        for metric in metrics:
            found, known = worst_of(rows, metric), worst.get(metric.name)
            if found and (known is None or _beats(found.value, known.value, metric.worse == "low")):
                worst[metric.name] = found
    return worst


def _beats(value: float, known: float, low: bool) -> bool:
    """Return whether a later value is worse; the first value that is not finite is the worst."""
    if not math.isfinite(known) or not math.isfinite(value):
        return math.isfinite(known)
    return value < known if low else value > known


def _left(steps: pa.Table, stage: int) -> int | None:
    scores = steps.select(["step", f"stage{stage}_score"]).drop_null()
    outside = (scores[1].to_numpy() > ALERT).astype(int)
    if len(outside) < PERSISTENCE:
        return None
    runs = np.flatnonzero(np.convolve(outside, np.ones(PERSISTENCE, int), "valid") == PERSISTENCE)
    return int(scores[0][int(runs[0])].as_py()) if len(runs) else None


def worst_of(rows: pa.Table, metric: Metric) -> Worst | None:
    """Return the worst value of a metric; not finite is worse than all, nulls are skipped."""
    column = rows[metric.name]
    measured = np.flatnonzero(column.is_valid().to_numpy())
    if not len(measured):
        return None
    values = column.drop_null().to_numpy()
    wild = np.flatnonzero(~np.isfinite(values))
    pick = wild[0] if len(wild) else values.argmin() if metric.worse == "low" else values.argmax()
    row = rows.slice(int(measured[pick]), 1).to_pylist()[0]
    where = {key: row.get(key) for key in ("layer", "site", "expert")}
    return Worst(value=float(values[pick]), step=row["step"], **where)


def outside(name: str, worst: Worst, table: str = "layers") -> bool:
    """Return whether a value is outside the metric's healthy range; false where it has none."""
    low, high = METRICS[table, name].healthy or (None, None)
    value = worst.value
    return (
        not math.isfinite(value)
        or (low is not None and value < low)
        or (high is not None and value > high)
    )


def _composite(worst: dict[str, Worst], projections: Iterable[pa.Table]) -> Composite:
    ends = [n for n in ("composite_gain_fwd", "composite_gain_bwd") if n in worst]
    if not ends:
        return Composite(verdict="absent", worst=None, direction="forward", bound=None)
    name = max(ends, key=lambda n: worst[n].value if math.isfinite(worst[n].value) else math.inf)
    top, bound = worst[name], _truncation(projections)
    verdict: Literal["within", "flat", "grew", "nonfinite"]
    if not math.isfinite(top.value):
        verdict = "nonfinite"
    elif bound is not None and top.value <= bound * (1 + EXACT):
        verdict = "within"
    else:
        verdict = "flat" if top.value <= 1 + NEAR else "grew"
    return Composite(
        verdict=verdict,
        worst=top,
        direction="forward" if name.endswith("fwd") else "backward",
        bound=bound,
    )


_PROJECTION = ("amax_gain_fwd_max", "amax_gain_bwd_max", "sinkhorn_residual")


def _truncation(projections: Iterable[pa.Table]) -> float | None:
    """The largest composite that unfinished Sinkhorn iterations alone explain: what each map
    leaves, compounded.

    A doubly stochastic map that was cut short still has exact sums on the side normalised last.
    Where neither side of some map is near 1, nothing was projected, and there is nothing to explain
    growth away with.
    """
    most = None
    for piece in projections:
        rows = piece.select(["rank", "attempt", "step", *_PROJECTION]).drop_null()
        if not rows.num_rows:
            continue
        fwd, bwd, left = (rows[n].to_numpy().astype(float) for n in _PROJECTION)
        if not (np.minimum(np.abs(fwd - 1), np.abs(bwd - 1)) < EXACT).all():
            return None
        rank, attempt, step = (
            rows[n].to_numpy().astype(np.int64) for n in ("rank", "attempt", "step")
        )
        _, moment = np.unique((rank << 48) + (attempt << 32) + step, return_inverse=True)
        most = max(most or 0.0, float(np.exp(np.bincount(moment, np.log1p(left)).max())))
    return most


def _found(run: Run) -> dict[str, int]:
    """Return the numbers of sites, routers and experts in the manifest."""
    found = run.manifest.get("found")
    found = found if isinstance(found, dict) else {}
    counts = {name: found.get(name) for name in ("sites", "routers", "experts")}
    return {
        n: len(c) if isinstance(c, list | dict) else c if isinstance(c, int) else 0
        for n, c in counts.items()
    }


def _missing(run: Run) -> list[str]:
    found = run.manifest.get("found")
    missing = found.get("missing") if isinstance(found, dict) else None
    return [str(line) for line in missing] if isinstance(missing, list) else []
