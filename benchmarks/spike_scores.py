"""Scores of a spike rule: hits, delays and false alarms on labelled curves."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from geodiag.benchmarks.spike_labels import Curve


@dataclass
class Score:
    """Counts of one rule on one group of curves."""

    spikes: int = 0
    hits: int = 0
    false: int = 0
    rows: int = 0
    delays: list[int] = field(default_factory=list)
    """Rows from breakout to alarm."""

    def summary(self) -> dict[str, float | None]:
        """Return recall, precision, F1, median delay and the rate of false alarms."""
        recall = self.hits / max(self.spikes, 1)
        precision = self.hits / max(self.hits + self.false, 1)
        return {
            "recall": recall,
            "precision": precision,
            "f1": 2 * recall * precision / max(recall + precision, 1e-9),
            "delay": statistics.median(self.delays) if self.delays else None,
            "false_per_10k": 1e4 * self.false / max(self.rows, 1),
        }


def score(alarms: Sequence[int], curve: Curve, into: Score) -> None:
    """Add the hits and false alarms of one curve to `into`.

    A spike is hit by an alarm from 3 rows before its onset to 25 rows after it. Alarms within a
    spike (up to 50 rows after its end) or within 10 rows of an ambiguous event are ignored. All
    other alarms are false; false alarms within 50 rows of one another count once.
    """
    spikes = [label for label in curve.labels if label.type == "spike"]
    excused = [(label.onset - 3, label.end + 50) for label in spikes]
    excused += [
        (label.onset - 10, label.end + 10) for label in curve.labels if label.type == "ambiguous"
    ]
    for label in spikes:
        first = next((row for row in alarms if label.onset - 3 <= row <= label.onset + 25), None)
        if first is not None:
            into.hits += 1
            into.delays.append(first - label.breakout)
    last = -math.inf
    for row in alarms:
        if not any(low <= row <= high for low, high in excused):
            into.false += row - last > 50
            last = row
    into.spikes += len(spikes)
    into.rows += len(curve.updates)
