"""Unique labels of runs: the folder name, with parent folders where names are equal."""

from collections import Counter
from collections.abc import Sequence

from geodiag.errors import GeodiagError
from geodiag.run import Run


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Return one unique label per run. GeodiagError if a run is given twice."""
    paths = [_path_parts(r) for r in runs]
    for url, count in Counter("/".join(w) for w in paths).items():
        if count > 1:
            raise GeodiagError(f"{url} is given {count} times; pass different runs")
    depth = [1] * len(paths)
    while True:
        labels = ["/".join(w[-d:]) for w, d in zip(paths, depth, strict=True)]
        equal = {label for label, count in Counter(labels).items() if count > 1}
        longer = [
            i for i, label in enumerate(labels) if label in equal and depth[i] < len(paths[i])
        ]
        if not longer:
            return labels
        for i in longer:
            depth[i] += 1


def _path_parts(run: Run) -> list[str]:
    """Return the parts of the absolute address, so that `runs/a` and `./runs/a` are the same."""
    return run.address.split("/")
