"""A cascade in words: what a trainer reads in ten seconds."""

import math
from typing import TYPE_CHECKING

from geodiag.cascade.defence import NAMES, Stage

if TYPE_CHECKING:
    from geodiag.cascade.evidence import Evidence
    from geodiag.cascade.types import Cascade


def in_words(c: "Cascade") -> str:
    """One to three sentences: where and when it began, how it went on, what would have stopped it."""
    if c.onset is None:
        end = "before the loss did" if c.spike else f"up to step {c.spike_onset:,}"
        return f"No internal precursor found: nothing that was recorded left its range {end}."
    return " ".join(s for s in (_began(c), _went_on(c), _fits(c)) if s)


def _began(c: "Cascade") -> str:
    """Where, when, and the two loudest measurements."""
    assert c.onset is not None
    what = "the loss" if c.spike else f"step {c.spike_onset:,}"
    ahead = (
        f"{_steps(c.lead)} before {what}, at step {c.onset:,}"
        if c.lead and c.lead > 0
        else f"at step {c.onset:,}"
    )
    if c.cause == "lr":
        e = c.evidence[0]
        rate = f"{e.value:.3g} where its schedule led to {e.usual:.3g}"
        return f"The learning rate began it, {ahead}: {rate}. All layers follow, so none is blamed."
    seen = "; ".join(measured(e) for e in c.evidence[:2])
    if c.stage == "data":
        domain = f" ({c.domain})" if c.domain else ""
        return f"The batch began it{domain}, {ahead}: the data left its range before any layer did, {seen}."
    place = where(c.layer, c.site, c.expert)
    return f"Began {ahead}, in {place}: {NAMES[c.stage or 1]} (stage {c.stage}), {seen}."


def _went_on(c: "Cascade") -> str:
    later = [o for o in c.path if o.layer is not None and (o.stage, o.layer) != (c.stage, c.layer)]
    if not later:
        return ""
    by_stage: dict[Stage, list[int]] = {}
    for o in later:
        by_stage.setdefault(o.stage, []).append(o.layer if o.layer is not None else 0)
    said = [f"{layers_in_words(sorted(set(ls)))} (stage {s})" for s, ls in by_stage.items()]
    return f"It reached {', then '.join(said[:3])}."


def _fits(c: "Cascade") -> str:
    return f"Fits: {c.defence}." if c.defence else ""


def where(layer: int | None, site: str | None = None, expert: int | None = None) -> str:
    """`layer 3, ffn, expert 6`."""
    parts = [] if layer is None else [f"layer {layer}"]
    parts += [site] if site and site != "block" else []
    parts += [] if expert is None else [f"expert {expert}"]
    return ", ".join(parts)


def layers_in_words(layers: list[int]) -> str:
    """`layer 4`, `layers 4–6`, `layers 1, 4–6`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    spans = [str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs]
    return f"layer{'s' * (len(layers) > 1)} {', '.join(spans)}"


def measured(e: "Evidence") -> str:
    """`gate_amax 38 (usually 4.2)`."""
    return f"{e.metric} {_number(e.value, e.unit)} (usually {_number(e.usual, e.unit)})"


def _number(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "not finite" if not math.isnan(value) else "unknown"
    return f"{100 * value:.3g} %" if unit == "share" else f"{'×' if unit == '×' else ''}{value:.3g}"


def _steps(n: int) -> str:
    return f"{n} step{'s' * (n != 1)}"
