"""The top of a report: the run on one card, and six numbers that say how it stands."""

import math
from collections.abc import Sequence

import numpy as np
from dash import html

from geodiag.cascade.explain import Cascade
from geodiag.dashboard.cascade import verdict_card
from geodiag.dashboard.components.components import badge, notice, tile
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
    "flat": "near 1 all along",
    "grew": "it grew",
    "nonfinite": "not finite",
}


def head(cache: RunCache, health: Health, cascades: Sequence[Cascade]) -> html.Section:
    """The run on one card: in words what happened to it, beside it what it is."""
    found = cache.manifest_section("found")
    step = "no step yet" if health.last_step is None else f"last step {integer(health.last_step)}"
    layers, streams = found.get("layers"), found.get("streams")
    what = {
        "model": found.get("family"),
        "layers": f"{layers}, {streams} stream{'s' * (streams != 1)}"
        if layers and streams
        else layers,
        "experts": f"{found['experts']}, top {k}"
        if (k := found.get("experts_per_token"))
        else health.found["experts"],
        "watched": f"{health.found['sites']} sites, {health.found['routers']} routers",
        "data": cache.setting("data"),
        "began, UTC": utc(cache.run.manifest.get("created"), "%Y-%m-%d %H:%M"),
    }
    facts = [
        html.Div(
            [
                html.Span(k, className="tile-label"),
                html.Span(str(v), className="fact-value"),
            ],
            className="fact",
        )
        for k, v in what.items()
        if v
    ]
    lacks = [notice(line) for line in health.missing]
    said = [
        html.Li(html.A(verdict_card.headline(c), href=f"#spike-{c.spike_onset}")) for c in cascades
    ]
    status_line = html.Div(
        [badge(health.status), html.Span(step, className="soft")], className="run-status"
    )
    words = html.Ul(said, className="lead") if said else html.P(_calm(health))
    left = html.Div([html.H1(cache.run.name), status_line, words, *lacks, *problems(cache)])
    return html.Section([left, html.Div(facts, className="facts of-run")], className="card verdict")


def _calm(h: Health) -> str:
    if h.last_step is None:
        return "No step is on record."
    c = h.composite
    said = f"{STATUS[h.status]} The loss never left its trend."
    if c.worst is None or c.verdict not in ("grew", "nonfinite"):
        return said
    return f"{said} Composite gain, {c.direction}: {factor(c.worst.value)} at {place(c.worst)}."


def tiles(cache: RunCache, h: Health, cascades: Sequence[Cascade]) -> list:
    lowest = _lowest(cache)
    detected_spikes = [c.spike_onset for c in cascades]
    span = (
        f"worst at {integer(detected_spikes[0])}"
        if len(detected_spikes) == 1
        else f"{integer(detected_spikes[0])} to {integer(detected_spikes[-1])}"
        if detected_spikes
        else ""
    )
    loss = metric("steps", "loss")
    tone = "alarm" if h.last_loss is not None and not math.isfinite(h.last_loss) else ""
    out = [
        tile("loss", number(h.last_loss), lowest, metric_help(loss), tone),
        tile(
            "spikes",
            str(len(h.spikes)),
            span,
            f"{KINDS['spike'].capitalize()}.",
            "alarm" if h.spikes else "",
        ),
    ]
    for stage, (name, what) in STAGES.items():
        left, scored = h.left[stage], f"stage{stage}_score" in h.worst
        said = f"left at {integer(left)}" if left is not None else "calm" if scored else "–"
        top = (
            f"{h.worst[f'stage{stage}_score'].value:.3g} robust z at worst"
            if scored
            else "not scored"
        )
        text = f"{what.capitalize()}. Left: more than 6 robust z from its own past for three steps in a row."
        out.append(tile(f"{stage} · {name}", said, top, text, "alarm" if left is not None else ""))
    c = h.composite
    gain = factor(c.worst.value) if c.worst else "–"
    grew = "alarm" if c.verdict in ("grew", "nonfinite") else ""
    return [
        *out,
        tile(
            "composite gain, worst",
            gain,
            _GAIN[c.verdict],
            metric_help(metric("layers", COMPOSITES[0])),
            grew,
        ),
    ]


def _lowest(cache: RunCache) -> str:
    steps = cache.steps()
    finite = np.flatnonzero(np.isfinite(steps["loss"]))
    if not len(finite):
        return ""
    at = finite[steps["loss"][finite].argmin()]
    return f"lowest {number(float(steps['loss'][at]))} at {integer(int(steps['step'][at]))}"
