"""Texts and numbers of the pages: help from the metric registry, number formats."""

import math
import time
from typing import Any

from geodiag.metrics.schema import METRICS, Metric

STATUS = {
    "running": "The training is running and recording.",
    "finished": "The training has ended normally.",
    "failed": "The training ended with an error.",
    "interrupted": "The training process has stopped without closing the run.",
}
ROUTING = {
    "off": "Each step chooses experts with its current weights.",
    "warmup": "The first expert choices are captured in advance; they are not used yet.",
    "on": "Experts are chosen by weights from Δ steps ago.",
    "drain": "The captured choices that remain are used up.",
}
POLICY = {
    "off": "Record what geodiag would do, and change nothing.",
    "auto": "Switch anticipatory routing on after a spike, and off again after a period.",
    "on": "Keep anticipatory routing on.",
}


def metric_help(metric: Metric, counterfactual: bool = False) -> str:
    """Return a description of a metric: meaning, unit, healthy range, source."""
    parts = [metric.help]
    if metric.unit not in ("1", ""):
        parts.append(f"Unit: {metric.unit}.")
    if metric.healthy:
        low, high = metric.healthy
        if low is None:
            healthy = f"below {high:g}"
        elif high is None:
            healthy = f"above {low:g}"
        else:
            healthy = f"{low:g} to {high:g}"
        parts.append(f"Healthy: {healthy}.")
    if counterfactual:
        parts.append("This model has no such clamp: these are the hits that a clamp would have.")
    parts.append(f"{metric.name} · {metric.source}")
    return " ".join(parts)


def metric(table: str, name: str) -> Metric:
    """Return a metric of the registry."""
    return METRICS[table, name]


def counterfactual(manifest: dict[str, Any], table: str, name: str) -> bool:
    """True if the run recorded what the metric would be with a part that the model lacks."""
    entries = manifest.get("registry") or []
    return any(
        e.get("counterfactual")
        for e in entries
        if e.get("table") == table and e.get("name") == name
    )


def number(value: float | None, digits: int = 4) -> str:
    """Format a number: `4.203`, `1.3e+06`, `not finite`, or `–` for a missing value."""
    if value is None or value != value:
        return "–"
    if value in (float("inf"), float("-inf")):
        return "not finite"
    return f"{value:.{digits}g}"


def factor(value: float | None) -> str:
    """Format a gain as the command line does: `×1.019`."""
    return number(value) if value is None or not math.isfinite(value) else f"×{value:.4g}"


def integer(value: int | None) -> str:
    """Format an integer with thousands separators, `–` for a missing value."""
    return "–" if value is None else f"{value:,}"


def percent(value: float | None) -> str:
    """Format a share as percent, `–` for a missing value."""
    return "–" if value is None or value != value else f"{100 * value:.3g} %"


def utc(seconds: float | None, format: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Format seconds since 1970 as a time in UTC."""
    return time.strftime(format, time.gmtime(seconds)) if seconds else ""
