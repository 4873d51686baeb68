"""Wall times of steps: the start of each attempt, plus the seconds of its steps."""

import time
from typing import Any

import numpy as np
import pyarrow as pa


class WallTimes:
    """Seconds since 1970 of each attempt and step, where the run recorded them."""

    def __init__(self, steps: pa.Table, manifest: dict[str, Any]) -> None:
        """`steps` has attempt, step and step_seconds of all attempts, one row each."""
        created = manifest.get("created")
        self._fallback = float(created) if isinstance(created, int | float) else time.time()
        attempt, step = (steps[n].to_numpy().astype(np.int64) for n in ("attempt", "step"))
        order = np.argsort(_key(attempt, step), kind="stable")
        attempt, step = attempt[order], step[order]
        seconds = steps["step_seconds"].to_numpy()[order].astype(np.float64)
        self._keys = _key(attempt, step)
        self._times = np.full(len(step), self._fallback)
        begun = _begun(manifest)
        for a in np.unique(attempt).tolist():
            of = attempt == a
            self._times[of] = begun.get(a, self._fallback) + _since_first(step[of], seconds[of])

    def of(self, attempt: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Return when the steps ended; a step without a time gets that of the step before."""
        if not len(self._keys):
            return np.full(len(step), self._fallback)
        at = (
            np.searchsorted(
                self._keys, _key(attempt.astype(np.int64), step.astype(np.int64)), side="right"
            )
            - 1
        )
        times: np.ndarray = self._times[np.maximum(at, 0)]
        return times


def _key(attempt: np.ndarray, step: np.ndarray) -> np.ndarray:
    key: np.ndarray = (attempt << 32) + step
    return key


def _begun(manifest: dict[str, Any]) -> dict[int, float]:
    """Return attempt → the time at which its first step was recorded."""
    recorded = manifest.get("attempts")
    entries = [e for e in recorded if isinstance(e, dict)] if isinstance(recorded, list) else []
    return {
        e["attempt"]: float(e["time"])
        for e in entries
        if "attempt" in e and isinstance(e.get("time"), int | float)
    }


def _since_first(step: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return seconds since the end of the first step; a step without seconds counts as 0."""
    took = np.where(np.isfinite(seconds), seconds, 0.0)
    took[1:] *= np.diff(step)
    elapsed: np.ndarray = np.cumsum(took) - took[0]
    return elapsed
