"""Rules that detect a loss spike: geodiag's and published ones, each written from its definition.

A rule takes the updates of a run and yields the rows that raise an alarm. All rules use the loss
only, with their default values.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from geodiag.spikes.detector import SpikeDetector
from geodiag.spikes.loss_curves import Update, find_spikes

Rule = Callable[[Sequence[Update]], Iterator[int]]


def geodiag_rule(**options: Any) -> Rule:
    """geodiag's detector; only events of kind `spike` are alarms."""

    def rule(updates: Sequence[Update]) -> Iterator[int]:
        rows = {update.step: row for row, update in enumerate(updates)}
        yield from (
            rows[s.detected]
            for s in find_spikes(updates, SpikeDetector(**options))
            if s.kind == "spike"
        )

    return rule


def windowed_sigma(sigmas: float, window: int, least: int) -> Rule:
    """Alarm `sigmas` standard deviations above the mean of the last `window` losses."""

    def rule(updates: Sequence[Update]) -> Iterator[int]:
        past: deque[float] = deque()
        total = squares = 0.0
        for row, update in enumerate(updates):
            if len(past) >= least:
                mean = total / len(past)
                variance = max(squares / len(past) - mean**2, 0) * len(past) / (len(past) - 1)
                if update.loss - mean > sigmas * math.sqrt(variance):
                    yield row
            past.append(update.loss)
            old = past.popleft() if len(past) > window else 0.0
            total += update.loss - old
            squares += update.loss**2 - old**2

    return rule


def over_previous(factor: float) -> Rule:
    """Alarm above `factor` times the previous loss."""

    def rule(updates: Sequence[Update]) -> Iterator[int]:
        yield from (
            i for i in range(1, len(updates)) if updates[i].loss > factor * updates[i - 1].loss
        )

    return rule


def over_mean(factor: float, window: int) -> Rule:
    """Alarm above `factor` times the mean of the last `window` losses without alarm."""

    def rule(updates: Sequence[Update]) -> Iterator[int]:
        past: deque[float] = deque(maxlen=window)
        for row, update in enumerate(updates):
            if len(past) == window and update.loss > factor * statistics.fmean(past):
                yield row
            else:
                past.append(update.loss)

    return rule


def zclip(threshold: float, decay: float, warmup: int) -> Rule:
    """Alarm at a z-score above `threshold` by exponential mean and variance (ZClip).

    An outlier enters both clipped to threshold² / z (arXiv 2504.02507).
    """

    def rule(updates: Sequence[Update]) -> Iterator[int]:
        first = [update.loss for update in updates[:warmup]]
        mean = statistics.fmean(first)
        variance = statistics.pvariance(first)
        for row, update in enumerate(updates[warmup:], start=warmup):
            loss = update.loss
            std = math.sqrt(variance) + 1e-12
            z = (loss - mean) / std
            if z > threshold:
                yield row
                loss = mean + threshold**2 / z * std
            variance = decay * variance + (1 - decay) * (loss - mean) ** 2
            mean = decay * mean + (1 - decay) * loss

    return rule


def holt(threshold: float, level_decay: float, trend_decay: float, warmup: int) -> Rule:
    """Alarm at a large z-score of the error of a double exponential forecast (Holt)."""

    def rule(updates: Sequence[Update]) -> Iterator[int]:
        level = updates[0].loss
        trend = 0.0
        variance = 0.0
        for row, update in enumerate(updates):
            error = update.loss - level - trend
            if row >= warmup and error > threshold * math.sqrt(variance):
                yield row
            variance = level_decay * variance + (1 - level_decay) * error**2
            previous = level
            level = level + trend + (1 - level_decay) * error
            trend = trend_decay * trend + (1 - trend_decay) * (level - previous)

    return rule


def hampel(threshold: float, window: int) -> Rule:
    """Alarm if two of the last three losses exceed the median by `threshold` MADs (Hampel)."""

    def rule(updates: Sequence[Update]) -> Iterator[int]:
        past: deque[float] = deque(maxlen=window)
        out: deque[bool] = deque(maxlen=3)
        for row, update in enumerate(updates):
            if len(past) == window:
                median = statistics.median(past)
                mad = statistics.median(abs(loss - median) for loss in past)
                out.append(update.loss - median > threshold * 1.4826 * mad)
                if out[-1] and sum(out) >= 2:
                    yield row
            past.append(update.loss)

    return rule


RULES: dict[str, Rule] = {
    "geodiag SpikeDetector": geodiag_rule(),
    "OLMo-core skip-step, 6 σ / 128": windowed_sigma(6, 128, least=64),
    "OLMo spike score, 7 σ / 1000": windowed_sigma(7, 1000, least=1000),
    "Megatron, 20 % over the previous": over_previous(1.2),
    "llm-foundry, 2 × mean of 100": over_mean(2, 100),
    "ZClip on the loss, z 2.5": zclip(2.5, 0.97, warmup=25),
    "Holt, level 0.97, trend 0.9, z 6": holt(6, 0.97, 0.9, warmup=25),
    "Hampel 64, z 6, two of three": hampel(6, 64),
}
