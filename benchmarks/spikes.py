"""Spike detectors on real labelled loss curves: ours beside the public rules, each written from its
definition.

    geodiag bench spikes CURVES

CURVES holds one CSV a run (step,loss[,grad_norm]) and labels.csv
(series,group,type,onset,breakout,peak,end). Results: benchmarks/results/spikes.json and spikes.md.
Numbers of rows stand for time: one row is one update.
"""

import csv
import inspect
import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geodiag.benchmarks.report import Parser, save, say, setting
from geodiag.benchmarks.spike_rules import RULES, Rule, geodiag_rule
from geodiag.benchmarks.spike_trials import PLANTED, TRIALS
from geodiag.spikes.detector import SpikeDetector
from geodiag.spikes.loss_curves import Update, read_updates


@dataclass(frozen=True)
class Label:
    """One labelled event; onset, breakout and end in rows."""

    type: str
    onset: int
    breakout: int
    end: int


@dataclass(frozen=True)
class Curve:
    group: str
    updates: list[Update]
    labels: list[Label]


@dataclass
class Score:
    """One rule on one group of curves."""

    spikes: int = 0
    hits: int = 0
    false: int = 0
    rows: int = 0
    delays: list[int] = field(default_factory=list)
    """Rows from breakout to alarm."""

    def summary(self) -> dict[str, float | None]:
        recall, precision = (
            self.hits / max(self.spikes, 1),
            self.hits / max(self.hits + self.false, 1),
        )
        return {
            "recall": recall,
            "precision": precision,
            "f1": 2 * recall * precision / max(recall + precision, 1e-9),
            "delay": statistics.median(self.delays) if self.delays else None,
            "false_per_10k": 1e4 * self.false / max(self.rows, 1),
        }


# -- curves and scoring ----------------------------------------------------------------------


def read_curves(folder: Path) -> list[Curve]:
    """The curves of labels.csv whose file is there."""
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
        return bisect_left(steps, float(next(row[name] for name in names if row[name])))

    events = [r for r in rows if r["type"] != "none"]
    return Curve(
        group,
        updates,
        [
            Label(r["type"], at(r, "onset"), at(r, "breakout", "onset"), at(r, "end", "onset"))
            for r in events
        ],
    )


def score(alarms: Sequence[int], curve: Curve, into: Score) -> None:
    """A spike is hit by an alarm from 3 rows before its onset to 25 after. Alarms within a spike
    (to 50 rows past its end) or 10 rows of an ambiguous event count for nothing. All others are
    false, merged within 50 rows.
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


# -- the table -------------------------------------------------------------------------------


def bench(curves: Path, sensitivity: bool = True) -> dict[str, Any]:
    """Scores every rule; and our detector with each option a fifth lower and higher, and on harder
    curves.
    """
    read = read_curves(curves)
    if not read:
        raise SystemExit(f"{curves} holds none of the curves that its labels.csv names")
    result: dict[str, Any] = {"rules": {name: evaluate(rule, read) for name, rule in RULES.items()}}
    result["microseconds_per_update"] = microseconds(read)
    result["rows"] = {
        group: sum(len(c.updates) for c in read if c.group == group) for group in groups(read)
    }
    if sensitivity:
        result["sensitivity"] = {
            f"{name} = {value:.4g}": evaluate(geodiag_rule(**options), read)
            for name, value, options in neighbours()
        }
        for part, trials in (("trials", TRIALS), ("planted", PLANTED)):
            result[part] = {
                t.name: evaluate(geodiag_rule(), [c for c in map(t.change, read) if c is not None])
                for t in trials
            }
    return result


def groups(curves: Sequence[Curve]) -> list[str]:
    return sorted({curve.group for curve in curves})


def evaluate(rule: Rule, curves: Sequence[Curve]) -> dict[str, dict]:
    """Group → summary of one rule."""
    scores = {group: Score() for group in groups(curves)}
    for curve in curves:
        score(sorted(rule(curve.updates)), curve, scores[curve.group])
    return {group: one.summary() for group, one in scores.items()}


def neighbours() -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Each option of the detector a fifth lower and a fifth higher, the others as they are."""
    for name, option in inspect.signature(SpikeDetector).parameters.items():
        for factor in (0.8, 1.2):
            value = option.default * factor
            if isinstance(option.default, int):
                value = math.floor(value) if factor < 1 else math.ceil(value)
            # The short median cannot be shorter than the warm-up.
            also = {"warmup": ("short", factor > 1), "short": ("warmup", factor < 1)}.get(name)
            yield name, value, {name: value} | ({also[0]: value} if also and also[1] else {})


def microseconds(curves: Sequence[Curve]) -> float:
    """Time of one update of our detector, best of three passes over the longest curve."""
    updates = max((curve.updates for curve in curves), key=len)
    seconds = []
    for _ in range(3):
        detector, start = SpikeDetector(), time.process_time()
        for update in updates:
            detector.update(*update)
        seconds.append(time.process_time() - start)
    return 1e6 * min(seconds) / len(updates)


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [
        "# Spike detectors on real loss curves",
        "",
        "A: every-step pre-training with spikes; B: MoE pre-training logged every 5th step, with spikes; C: healthy;",
        "D: noisy, fine-tuning. Delay: median rows from the breakout. C and D: false alarms in 10,000 rows.",
        "Public rules with their defaults, on the loss alone, written from their definitions.",
        "",
        *_table("rule", result["rules"]),
        "",
        f"One update of ours takes {result['microseconds_per_update']:.1f} µs on one CPU core.",
    ]
    if "sensitivity" in result:
        lines += [
            "",
            "## Each option a fifth lower and higher",
            "",
            *_table("option", result["sensitivity"]),
        ]
    if "trials" in result:
        lines += [
            "",
            "## Ours on the same curves made harder",
            "",
            *_table("change", result["trials"]),
        ]
        about = "Every 600 updates, on the curves of C and D that log each step; σ is that of the 200 updates before."
        about += " One log of D was smoothed before logging: a jump that only decays is one bad batch there."
        lines += [
            "",
            "## Events planted on healthy curves",
            "",
            about,
            "",
            *_planted(result["planted"]),
        ]
    return "\n".join(lines) + "\n"


def _planted(rows: dict[str, dict]) -> Iterator[str]:
    yield "| planted | C recall | C delay | C false | D recall | D delay | D false |"
    yield "|---|---|---|---|---|---|---|"
    for name, by_group in rows.items():
        cells = []
        for group in (by_group.get(g, Score().summary()) for g in "CD"):
            hit = (
                f"{group['recall']:.2f} | {group['delay']:g}"
                if group["delay"] is not None
                else "– | –"
            )
            cells.append(f"{hit} | {group['false_per_10k']:.1f}")
        yield f"| {name} | {' | '.join(cells)} |"


def _table(first: str, rows: dict[str, dict]) -> Iterator[str]:
    yield f"| {first} | A recall / precision | A F1 | A delay | B recall / precision | B F1 | C false | D false |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, by_group in rows.items():
        a, b, c, d = (by_group.get(g, Score().summary()) for g in "ABCD")
        both = [f"{g['recall']:.2f} / {g['precision']:.2f} | {g['f1']:.2f}" for g in (a, b)]
        delay = "–" if a["delay"] is None else f"{a['delay']:g}"
        yield f"| {name} | {both[0]} | {delay} | {both[1]} | {c['false_per_10k']:.1f} | {d['false_per_10k']:.1f} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("spikes", __doc__)
    parser.add_argument("curves", type=Path, help="folder with labels.csv and one CSV a curve")
    options = parser.parse_args(argv)
    if not (options.curves / "labels.csv").is_file():
        parser.error(
            f"{options.curves} has no labels.csv (series,group,type,onset,breakout,peak,end)"
        )
    result = setting("spikes", argv) | bench(options.curves)
    save("spikes", result, markdown(result), options.out)
    say(result, markdown(result), options.json)


if __name__ == "__main__":
    main()
