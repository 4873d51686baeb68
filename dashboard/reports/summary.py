"""The top of a report: a card with the facts of the run, and six headline numbers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from dash import html

from geodiag.cascade.explain import Cascade
from geodiag.dashboard.cascade import verdict_card
from geodiag.dashboard.components.basic import badge, notice, tile
from geodiag.dashboard.components.frame import problems
from geodiag.dashboard.components.text import (
    STATUS,
    factor,
    integer,
    metric,
    metric_help,
    number,
    utc,
)
from geodiag.dashboard.components.tiles import COMPOSITES
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.figures.cascade import STAGES
from geodiag.dashboard.reports.tables import place
from geodiag.events import KINDS
from geodiag.health import Health

_GAIN = {
    "absent": "no residual maps measured",
    "within": "within the truncation error",
    "flat": "close to 1 throughout",
    "grew": "grew during the run",
    "nonfinite": "not finite",
}


def head(cache: RunCache, health: Health, cascades: Sequence[Cascade]) -> html.Section:
    """Return the card: what happened to the run in words, and its facts."""
    step = "no step yet" if health.last_step is None else f"last step {integer(health.last_step)}"
    links = [
        html.Li(html.A(verdict_card.headline(c), href=f"#spike-{c.spike_onset}")) for c in cascades
    ]
    words = html.Ul(links, className="lead") if links else html.P(_words_without_spike(health))
    status = html.Div(
        [badge(health.status), html.Span(step, className="soft")], className="run-status"
    )
    missing = [notice(line) for line in health.missing]
    left = html.Div([html.H1(cache.run.name), status, words, *missing, *problems(cache)])
    facts = [_fact(name, value) for name, value in _facts(cache, health).items() if value]
    return html.Section([left, html.Div(facts, className="facts of-run")], className="card verdict")


def _fact(name: str, value: Any) -> html.Div:
    label = html.Span(name, className="tile-label")
    return html.Div([label, html.Span(str(value), className="fact-value")], className="fact")


def _facts(cache: RunCache, health: Health) -> dict[str, Any]:
    found = cache.manifest_section("found")
    layers = found.get("layers")
    streams = found.get("streams")
    if layers and streams:
        layers = f"{layers}, {streams} stream{'s' * (streams != 1)}"
    top_k = found.get("experts_per_token")
    experts = f"{found['experts']}, top {top_k}" if top_k else health.found["experts"]
    return {
        "model": found.get("family"),
        "layers": layers,
        "experts": experts,
        "measured": f"{health.found['sites']} sites, {health.found['routers']} routers",
        "data": cache.setting("data"),
        "started, UTC": utc(cache.run.manifest.get("created"), "%Y-%m-%d %H:%M"),
    }


def _words_without_spike(h: Health) -> str:
    if h.last_step is None:
        return "No step was recorded."
    c = h.composite
    words = f"{STATUS[h.status]} The loss never left its trend."
    if c.worst is None or c.verdict not in ("grew", "nonfinite"):
        return words
    return f"{words} Composite gain, {c.direction}: {factor(c.worst.value)} at {place(c.worst)}."


def tiles(cache: RunCache, h: Health, cascades: Sequence[Cascade]) -> list:
    """Return the tiles: loss, spikes, the three stages, composite gain."""
    return [
        _loss_tile(cache, h),
        _spike_tile(h, cascades),
        *(_stage_tile(h, stage) for stage in STAGES),
        _gain_tile(h),
    ]


def _loss_tile(cache: RunCache, h: Health) -> Any:
    finite = h.last_loss is None or math.isfinite(h.last_loss)
    text = metric_help(metric("steps", "loss"))
    return tile("loss", number(h.last_loss), _lowest(cache), text, "" if finite else "alarm")


def _spike_tile(h: Health, cascades: Sequence[Cascade]) -> Any:
    onsets = [c.spike_onset for c in cascades]
    note = ""
    if len(onsets) == 1:
        note = f"worst at {integer(onsets[0])}"
    elif onsets:
        note = f"{integer(onsets[0])} to {integer(onsets[-1])}"
    text = f"{KINDS['spike'].capitalize()}."
    return tile("spikes", str(len(h.spikes)), note, text, "alarm" if h.spikes else "")


def _stage_tile(h: Health, stage: int) -> Any:
    name, explanation = STAGES[stage]
    left = h.left[stage]
    score = h.worst.get(f"stage{stage}_score")
    value = "–" if score is None else "usual"
    if left is not None:
        value = f"unusual at {integer(left)}"
    note = "no scores" if score is None else f"{score.value:.3g} robust z at worst"
    text = (
        f"{explanation.capitalize()}. Unusual: more than 6 robust z from its own past for three "
        "steps in a row."
    )
    return tile(f"{stage} · {name}", value, note, text, "" if left is None else "alarm")


def _gain_tile(h: Health) -> Any:
    c = h.composite
    gain = factor(c.worst.value) if c.worst else "–"
    tone = "alarm" if c.verdict in ("grew", "nonfinite") else ""
    text = metric_help(metric("layers", COMPOSITES[0]))
    return tile("composite gain, worst", gain, _GAIN[c.verdict], text, tone)


def _lowest(cache: RunCache) -> str:
    steps = cache.steps()
    finite = np.flatnonzero(np.isfinite(steps["loss"]))
    if not len(finite):
        return ""
    at = finite[steps["loss"][finite].argmin()]
    return f"lowest {number(float(steps['loss'][at]))} at {integer(int(steps['step'][at]))}"
