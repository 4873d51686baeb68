"""Words and numbers as readers want them: help from the registry, large numbers with commas,
unknowns as a dash.
"""

import math
import time
from typing import Any

from geodiag.metrics.schema import METRICS, Metric

STATUS = {
    "running": "The training is alive and writing.",
    "finished": "The training ended and closed the run.",
    "failed": "The training ended with an error.",
    "interrupted": "The run says running, but its process is gone.",
}
ROUTING = {
    "off": "Each step routes with its own weights.",
    "warmup": "The first expert choices are being captured ahead; they are not used yet.",
    "on": "Experts are chosen by the weights of some steps ago.",
    "drain": "The last captured choices are being used up.",
}
POLICY = {
    "off": "Record what would have been done; change nothing.",
    "auto": "Switch anticipatory routing on when a spike is found, and off again after a period.",
    "on": "Keep anticipatory routing on.",
}


def about(metric: Metric, counterfactual: bool = False) -> str:
    """A metric in plain words: what it is, its unit, its healthy range, where it comes from."""
    parts = [metric.help]
    if metric.unit not in ("1", ""):
        parts.append(f"Unit: {metric.unit}.")
    if metric.healthy:
        low, high = metric.healthy
        said = (
            f"below {high:g}"
            if low is None
            else f"above {low:g}"
            if high is None
            else f"{low:g} to {high:g}"
        )
        parts.append(f"Healthy: {said}.")
    if counterfactual:
        parts.append("This model has no such clamp: these are the hits it would have.")
    parts.append(f"{metric.name} · {metric.source}")
    return " ".join(parts)


def metric(table: str, name: str) -> Metric:
    return METRICS[table, name]


def counterfactual(manifest: dict[str, Any], table: str, name: str) -> bool:
    """Whether the run's registry marks the metric as "would have been"."""
    entries = manifest.get("registry") or []
    return any(
        e.get("counterfactual")
        for e in entries
        if e.get("table") == table and e.get("name") == name
    )


def number(value: float | None, digits: int = 4) -> str:
    """`4.203`, `1.3e+06`, `∞` for what is not finite, `–` for what is not there."""
    if value is None or value != value:
        return "–"
    if value in (float("inf"), float("-inf")):
        return "not finite"
    return f"{value:.{digits}g}"


def factor(value: float | None) -> str:
    """A gain, as the command line writes it too: `×1.019`."""
    return number(value) if value is None or not math.isfinite(value) else f"×{value:.4g}"


def integer(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.3g} %"


def utc(seconds: float | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    return time.strftime(form, time.gmtime(seconds)) if seconds else ""
