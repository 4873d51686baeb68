"""What runs are called beside each other: the folder's name, and as much of the way to it as tells
them apart.
"""

from collections import Counter
from collections.abc import Sequence

from geodiag.errors import GeodiagError
from geodiag.run import Run


def labels_of(runs: Sequence[Run]) -> list[str]:
    """One label a run, no two alike. GeodiagError where a run is given twice."""
    ways = [_way(r) for r in runs]
    for url, times in Counter("/".join(w) for w in ways).items():
        if times > 1:
            raise GeodiagError(f"{url} is given {times} times; pass different runs")
    depth = [1] * len(ways)
    while True:
        labels = ["/".join(w[-d:]) for w, d in zip(ways, depth, strict=True)]
        alike = {label for label, times in Counter(labels).items() if times > 1}
        longer = [i for i, label in enumerate(labels) if label in alike and depth[i] < len(ways[i])]
        if not longer:
            return labels
        for i in longer:
            depth[i] += 1


def _way(run: Run) -> list[str]:
    """The parts of the address; a local path from the root on, so that `runs/a` and `./runs/a` are
    one.
    """
    return run.address.split("/")
