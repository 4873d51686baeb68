"""Long tables, a stretch of steps at a time: the rows of a long run take gigabytes, what is made of
them does not.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

from geodiag.store.reader import Steps

if TYPE_CHECKING:
    from geodiag.run import Run

CELLS, GLANCE = 1 << 25, 64
"""Numbers read at once, and the newest steps by which a step's rows are counted."""


def stretches(
    run: "Run", table: str, columns: int, first: int, last: int, cells: int | None = None
) -> list[Steps]:
    """Ranges of steps that cover a table whose steps are `first` to `last`, for so many columns of
    it.
    """
    seen = len(run.read_arrow(table, ["step"], steps=(last + 1 - GLANCE, None)))
    wide = max(GLANCE, (cells or CELLS) // max(1, columns) * GLANCE // max(1, seen))
    return list(pairwise([None, *range(first + wide, last + 1, wide), None]))
