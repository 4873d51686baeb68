"""Labelled loss curves: one CSV file a curve, and labels.csv with their events."""

import csv
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from geodiag.spikes.loss_curves import Update, read_updates


@dataclass(frozen=True)
class Label:
    """One labelled event; onset, breakout and end are row numbers."""

    type: str
    onset: int
    breakout: int
    end: int


@dataclass(frozen=True)
class Curve:
    """One loss curve and its labelled events."""

    group: str
    """A to D; benchmarks/results/spikes.md describes the groups."""
    updates: list[Update]
    labels: list[Label]


def read_curves(folder: Path) -> list[Curve]:
    """Return the curves of labels.csv whose file exists."""
    labels: dict[tuple[str, str], list[dict[str, str]]] = {}
    with (folder / "labels.csv").open() as file:
        for row in csv.DictReader(file):
            labels.setdefault((row["series"], row["group"]), []).append(row)
    return [
        _curve(folder / f"{series}.csv", group, rows)
        for (series, group), rows in labels.items()
        if (folder / f"{series}.csv").exists()
    ]


def _curve(path: Path, group: str, rows: list[dict[str, str]]) -> Curve:
    updates = read_updates(str(path))
    steps = [update.step for update in updates]

    def at(row: dict[str, str], *names: str) -> int:
        """Return the row of the first step that is given in these columns."""
        return bisect_left(steps, float(next(row[name] for name in names if row[name])))

    labels = [
        Label(r["type"], at(r, "onset"), at(r, "breakout", "onset"), at(r, "end", "onset"))
        for r in rows
        if r["type"] != "none"
    ]
    return Curve(group, updates, labels)
