"""A cascade in words: one to four sentences that are understood in ten seconds."""

import math
from typing import TYPE_CHECKING

from geodiag.cascade.defence import NAMES, Stage

if TYPE_CHECKING:
    from geodiag.cascade.evidence import Evidence
    from geodiag.cascade.types import Cascade

_OUTCOMES = {
    "spike": "the loss spike",
    "divergence": "the loss divergence",
    "nonfinite": "the non-finite loss",
}


def describe(c: "Cascade") -> str:
    """Return where and when the cascade began, how it spread, and the suggested fix."""
    if c.onset is None:
        until = "before the loss did" if c.spike else f"up to step {c.spike_onset:,}"
        return f"No internal precursor found: no recorded metric left its range {until}."
    return " ".join(s for s in (_origin_sentence(c), _spread_sentence(c), fix_sentence(c)) if s)


def _origin_sentence(c: "Cascade") -> str:
    """Return the stage, the place, the step and the two strongest measurements."""
    assert c.onset is not None
    when = f"at step {c.onset:,}"
    if c.lead and c.lead > 0:
        when += f", {_steps(c.lead)} before {_outcome(c)}"
    if c.cause == "lr":
        rate = c.evidence[0]
        return (
            f"Cause: the learning rate. It left its schedule {when}: {rate.value:.3g} "
            f"instead of {rate.usual:.3g}. All layers react to it, so no layer is blamed."
        )
    metrics = "; ".join(measurement_label(e) for e in c.evidence[:2])
    if c.stage == "data":
        domain = f" (domain {c.domain})" if c.domain else ""
        cause = f"Cause: the batch{domain}. The data left its range before any layer"
        return f"{cause}, {when}: {metrics}."
    place = place_label(c.layer, c.site, c.expert)
    return f"Stage {c.stage}: {NAMES[c.stage or 1]}. It began in {place}, {when}: {metrics}."


def _outcome(c: "Cascade") -> str:
    if c.spike is None:
        return f"step {c.spike_onset:,}"
    return _OUTCOMES.get(c.spike["kind"], "the loss spike")


def _spread_sentence(c: "Cascade") -> str:
    """Return the layers that left their range later, stage by stage."""
    later = [o for o in c.path if o.layer is not None and (o.stage, o.layer) != (c.stage, c.layer)]
    if not later:
        return ""
    by_stage: dict[Stage, list[int]] = {}
    for o in later:
        by_stage.setdefault(o.stage, []).append(o.layer if o.layer is not None else 0)
    groups = [f"{layers_label(sorted(set(ls)))} (stage {s})" for s, ls in by_stage.items()]
    verb = "It spread to" if c.cause == "layer" else "Out of range after that:"
    return f"{verb} {', then '.join(groups[:3])}."


def fix_sentence(c: "Cascade") -> str:
    """Return the sentence with the suggested fix; empty if there is none."""
    return f"Suggested fix: {c.defence}." if c.defence else ""


def place_label(layer: int | None, site: str | None = None, expert: int | None = None) -> str:
    """Return a place as text, e.g. `layer 3, ffn, expert 6`."""
    parts = [] if layer is None else [f"layer {layer}"]
    parts += [site] if site and site != "block" else []
    parts += [] if expert is None else [f"expert {expert}"]
    return ", ".join(parts)


def layers_label(layers: list[int]) -> str:
    """Return sorted layers as text: `layer 4`, `layers 4–6` or `layers 1, 4–6`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    spans = [str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs]
    return f"layer{'s' * (len(layers) > 1)} {', '.join(spans)}"


def measurement_label(e: "Evidence") -> str:
    """Return a measurement as text, e.g. `gate_amax 38 (usually 4.2)`."""
    return f"{e.metric} {_number(e.value, e.unit)} (usually {_number(e.usual, e.unit)})"


def _number(value: float, unit: str) -> str:
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "not finite"
    return f"{100 * value:.3g} %" if unit == "share" else f"{'×' if unit == '×' else ''}{value:.3g}"


def _steps(n: int) -> str:
    return f"{n} step{'s' * (n != 1)}"
