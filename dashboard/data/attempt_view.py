"""A run as an earlier attempt lived it: a spike that was rolled back is looked at among its own
steps.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from geodiag.run import Run
from geodiag.store.manifest import known_starts
from geodiag.store.reader import Steps


class PastRun(Run):
    """Reads what was there when `attempt_shown` was the newest; `events` are read whole, as ever."""

    attempt_shown: int

    @classmethod
    def of(cls, run: Run, attempt: int) -> "PastRun":
        past = cls.open(run.url)
        assert isinstance(past, PastRun)
        past.attempt_shown = attempt
        return past

    def read_arrow(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        steps: Steps | None = None,
        attempt: int | Literal["newest", "all"] | None = None,
        ranks: Literal["each", "merged"] = "each",
    ) -> pa.Table:
        if attempt is not None or table == "events":
            return super().read_arrow(table, columns, steps, attempt, ranks)
        needed = None if columns is None else list(dict.fromkeys([*columns, "attempt", "step"]))
        rows = super().read_arrow(table, needed, steps, "all", ranks)
        mine_n, step_n = rows["attempt"].to_numpy(), rows["step"].to_numpy()
        keep_n = mine_n <= self.attempt_shown
        for later, first in known_starts(self.manifest).items():
            if later <= self.attempt_shown:
                keep_n &= (mine_n >= later) | (step_n < first)
        rows = rows.filter(pa.array(np.asarray(keep_n)))
        return rows if columns is None else rows.select(list(columns))

    def refresh(self) -> "PastRun":
        return self
