"""Made-up runs whose every number is known: noise around a level of its own, and shifts where a
test wants them.
"""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geodiag.anomaly.metric_roles import SIGNALS, Series
from geodiag.events import Event
from geodiag.run import Run

EXPERTS = 4


@dataclass
class Planted:
    """A run of `layers` layers, the first with a hash router. `shift` as often as wanted, then
    `write`.
    """

    steps: int = 300
    layers: int = 4
    every: int = 1
    seed: int = 0
    spike: int | None = 250
    """Onset of the loss spike; None for a calm loss."""
    lr: np.ndarray | None = None
    skip: tuple[str, ...] = ()
    """Tables that are not written."""
    shifts: list[tuple[Series, int, int, float]] = field(default_factory=list)

    def shift(
        self,
        metric: str,
        layer: int,
        site: str,
        at: int,
        by: float,
        last: int = 10**9,
        expert: int | None = None,
    ) -> "Planted":
        """From step `at` to `last`, the logarithm of a metric at a place is `by` higher."""
        self.shifts.append((Series(metric, layer, site, expert), at, last, by))
        return self

    def value(self, series: Series, noise_S: np.ndarray) -> np.ndarray:
        """The series at every step."""
        rng = np.random.default_rng(zlib.crc32(repr(series).encode()))
        logs = np.log(rng.uniform(0.05, 0.2)) + 0.04 * noise_S
        step_S = np.arange(self.steps)
        for where, at, last, by in self.shifts:
            if where == series:
                logs = np.where((step_S >= at) & (step_S <= last), logs + by, logs)
        return np.exp(logs)

    def write(self, path: Path, close: bool = True, **create: Any) -> Run:
        run = Run.create(path, found={"sites": 2 * self.layers, "routers": self.layers}, **create)
        self.append(run)
        if close:
            run.close()
        return run

    def append(self, run: Run, first: int = 0) -> None:
        """The steps from `first` on, as rows of the present attempt."""
        rng, step_S = np.random.default_rng(self.seed), np.arange(self.steps)
        loss = 2 + 0.02 * rng.standard_normal(self.steps)
        if self.spike is not None:
            loss[self.spike : self.spike + 12] += 1.0
        keep = step_S >= first
        lr = np.full(self.steps, 1e-3) if self.lr is None else self.lr
        if "steps" not in self.skip:
            run.append("steps", {"step": step_S[keep], "loss": loss[keep], "lr": lr[keep]})
        keep &= step_S % self.every == 0
        for table in ("layers", "experts"):
            columns = self._table(table, rng, keep)
            if table not in self.skip:
                run.append(table, columns)
        if self.spike is not None and "events" not in self.skip:
            self.record_spike(run, self.spike)

    def record_spike(self, run: Run, onset: int) -> None:
        """Add the event that the detector leaves for a spike."""
        data = {
            "kind": "spike",
            "detected": onset + 2,
            "onset": onset,
            "peak": onset + 4,
            "end": onset + 15,
            "score": 20,
        }
        run.event(Event(step=onset + 2, kind="spike", message="the loss left its trend", data=data))

    def _table(self, table: str, rng: np.random.Generator, keep: np.ndarray) -> dict[str, Any]:
        keys = [
            (layer, k)
            for layer in range(self.layers)
            for k in range(2 if table == "layers" else EXPERTS)
        ]
        n = len(keys)
        columns: dict[str, Any] = {
            "step": np.repeat(np.flatnonzero(keep), n),
            "layer": [layer for layer, _ in keys] * int(keep.sum()),
            "site" if table == "layers" else "expert": [
                ("attn", "ffn")[k] if table == "layers" else k for _, k in keys
            ]
            * int(keep.sum()),
        }
        for name in (m for t, m in SIGNALS if t == table):
            grid = np.ma.masked_all((int(keep.sum()), n), np.float64)
            for i, (layer, k) in enumerate(keys):
                series = (
                    Series(name, layer, "ffn", k)
                    if table == "experts"
                    else Series(name, layer, ("attn", "ffn")[k])
                )
                noise = rng.standard_normal(self.steps)
                if series.site == "attn" and SIGNALS[table, name].part in ("router", "experts"):
                    continue
                if layer == 0 and name.startswith("router_margin"):
                    continue  # a hash router has no margin
                grid[:, i] = self.value(series, noise)[keep]
            columns[name] = grid.ravel()
        return columns
