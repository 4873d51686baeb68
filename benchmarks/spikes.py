"""Benchmark of spike detectors on real labelled loss curves: geodiag and published rules.

    geodiag bench spikes CURVES

CURVES holds one CSV a run (step,loss[,grad_norm]) and labels.csv
(series,group,type,onset,breakout,peak,end). Results: benchmarks/results/spikes.json and spikes.md.
Time is counted in rows: one row is one update.
"""

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from geodiag.benchmarks.report import Parser, save, say, setting
from geodiag.benchmarks.spike_labels import Curve, read_curves
from geodiag.benchmarks.spike_rules import RULES, Rule, geodiag_rule
from geodiag.benchmarks.spike_scores import Score, score
from geodiag.benchmarks.spike_trials import PLANTED, TRIALS
from geodiag.benchmarks.spikes_page import markdown
from geodiag.spikes.detector import SpikeDetector


def bench(curves: Path, sensitivity: bool = True) -> dict[str, Any]:
    """Score every rule; with `sensitivity` also the detector with changed options and curves."""
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
    """Return the summary of one rule by group of curves."""
    scores = {group: Score() for group in groups(curves)}
    for curve in curves:
        score(sorted(rule(curve.updates)), curve, scores[curve.group])
    return {group: one.summary() for group, one in scores.items()}


def neighbours() -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Yield each option of the detector a fifth lower and higher, the others at their defaults."""
    for name, option in inspect.signature(SpikeDetector).parameters.items():
        for factor in (0.8, 1.2):
            value = option.default * factor
            if isinstance(option.default, int):
                value = math.floor(value) if factor < 1 else math.ceil(value)
            # The short median cannot be shorter than the warm-up.
            also = {"warmup": ("short", factor > 1), "short": ("warmup", factor < 1)}.get(name)
            yield name, value, {name: value} | ({also[0]: value} if also and also[1] else {})


def microseconds(curves: Sequence[Curve]) -> float:
    """Return the time of one update of the detector, best of three passes over one curve."""
    updates = max((curve.updates for curve in curves), key=len)
    seconds = []
    for _ in range(3):
        detector = SpikeDetector()
        start = time.process_time()
        for update in updates:
            detector.update(*update)
        seconds.append(time.process_time() - start)
    return 1e6 * min(seconds) / len(updates)


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
