"""Long tables in ranges of steps, because the rows of a long run would take gigabytes at once."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import pyarrow as pa

from geodiag.store.reader import Steps

CELLS = 1 << 25
"""Numbers read at once: rows × columns."""
NEWEST_STEPS = 64
"""The rows of a step are counted on so many newest steps; a chunk is not shorter."""


class TableReader(Protocol):
    """What a `Run` offers to this module."""

    def read_arrow(
        self, table: str, columns: Sequence[str] | None = None, steps: Steps | None = None
    ) -> pa.Table:
        """Return rows of `table`; see `Run.read_arrow`."""


def step_chunks(
    run: TableReader, table: str, columns: int, first: int, last: int, cells: int | None = None
) -> list[Steps]:
    """Return consecutive ranges of steps that cover a table, for reading one after another.

    Args:
        run: the run that contains the table.
        table: name of the table; its steps are `first` to `last`.
        columns: number of columns that will be read.
        cells: numbers read at once, `CELLS` by default.
    """
    newest = run.read_arrow(table, ["step"], steps=(last + 1 - NEWEST_STEPS, None))
    rows_at_once = (cells or CELLS) // max(1, columns)
    length = max(NEWEST_STEPS, rows_at_once * NEWEST_STEPS // max(1, len(newest)))
    return list(pairwise([None, *range(first + length, last + 1, length), None]))
