"""The page of a comparison of runs: losses, key metrics, stages, spikes, differing settings."""

from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
from dash import html

from geodiag.dashboard.components.basic import card, notice
from geodiag.dashboard.components.text import integer, metric, metric_help, number, utc
from geodiag.dashboard.figures.event_marks import draw_superseded
from geodiag.dashboard.figures.run_overlay import Panel, Ring, Track, overlay
from geodiag.dashboard.figures.style import Theme
from geodiag.dashboard.figures.timeline import STAGES, loss_at
from geodiag.dashboard.reports import comparison_tables
from geodiag.dashboard.reports.comparison import ComparedRun, Comparison
from geodiag.dashboard.reports.html_file import HtmlFile, logo
from geodiag.health import ALERT, SPIKES

_ZOOM = "Drag to zoom, double click to reset; click a name to hide its run."
_RINGS = "Rings mark spikes; grey lines are steps that were rolled back."
_LEAST_Z = 2.0
"""Stage scores below this value are noise: the worst of many layers is never 0."""


def page(c: Comparison, now: float) -> str:
    """Return the HTML of the page; `now` is the time of writing in seconds since 1970."""
    names = [s.label for s in c.runs]
    title = " and ".join(names) if len(names) == 2 else f"{len(names)} runs"
    paper = HtmlFile(f"{title} · geodiag compare")
    differences = c.differences()
    sections = [
        ("runs", "Runs", comparison_tables.head(c, title)),
        ("loss", "Loss", _losses(c, paper)),
        (
            "metrics",
            "Metrics",
            card(
                "Worst and newest values",
                comparison_tables.metrics(c),
                tip=comparison_tables.METRICS_TIP,
            ),
        ),
        ("stages", "Stages", _stages(c, paper)),
        ("spikes", "Spikes", card("Spikes", comparison_tables.spikes(c))),
        (
            "settings",
            "Settings",
            card(
                f"What differs: {len(differences)} settings",
                comparison_tables.settings(c, differences),
            ),
        ),
    ]
    head = [
        html.Span([logo(), "geodiag"], className="brand"),
        html.Span(title, className="crumb here"),
    ]
    return paper.html(
        sections,
        head,
        f"geodiag compare, {utc(now)} UTC. " + " · ".join(s.cache.run.url for s in c.runs),
    )


def _losses(c: Comparison, paper: HtmlFile) -> html.Div:
    steps = card(
        "Loss over steps",
        paper.chart(
            partial(draw_losses, c), "Loss and gradient norm of every run over steps", "steps"
        ),
        tip=f"{metric_help(metric('steps', 'loss'))} {_RINGS} {_ZOOM}",
    )
    unknown = [s.label for s in c.runs if s.tokens() is None]
    if len(unknown) == len(c.runs):
        return html.Div(steps)
    lacks = (
        [notice(f"Some steps of {', '.join(unknown)} have no number of tokens.")] if unknown else []
    )
    tokens = card(
        "Loss over tokens",
        *lacks,
        paper.chart(partial(draw_losses_over_tokens, c), "Loss of every run over tokens"),
        tip=_ZOOM,
    )
    return html.Div([steps, tokens], className="column")


def draw_losses(c: Comparison, theme: Theme) -> go.Figure:
    """Draw loss and gradient norm of every run over steps."""
    tracks = [Track(s.label, x := s.cache.steps()["step"], x, _rings(s)) for s in c.runs]
    panels = [
        Panel("loss", metric("steps", "loss").unit, _column(c, "loss"), 330),
        Panel("grad norm", "", _column(c, "grad_norm"), 130),
    ]
    fig = overlay(tracks, panels, theme)
    for s in c.runs:
        step_S = s.cache.steps()["step"]
        if len(step_S):
            before = len(fig.data)
            draw_superseded(
                fig, s.cache.superseded(), int(step_S[0]), int(step_S[-1]), theme, {"loss": "y"}
            )
            for trace in fig.data[before:]:
                trace.update(showlegend=False, hoverinfo="skip", hovertemplate=None)
    return fig


def draw_losses_over_tokens(c: Comparison, theme: Theme) -> go.Figure:
    """Draw the losses over tokens; runs with unknown token numbers are left out."""
    known = [(s, t) for s in c.runs if (t := s.tokens()) is not None]
    tracks, values = [], []
    for s in c.runs:
        found = next((t for other, t in known if other is s), None)
        steps = s.cache.steps()
        x_S = np.array([]) if found is None else found
        step_S = steps["step"] if found is not None else np.array([])
        tracks.append(Track(s.label, step_S, x_S))
        values.append(steps["loss"] if found is not None else np.array([]))
    return overlay(
        tracks, [Panel("loss", metric("steps", "loss").unit, values, 280)], theme, "tokens"
    )


def _stages(c: Comparison, paper: HtmlFile) -> html.Section:
    tip = (
        "Distance of the worst layer from its own past, in robust z (standard deviations, "
        f"estimated from the median). The dotted line is the alert level, {ALERT:g}: a stage above "
        f"it for three steps in a row is unusual. Noise up to {_LEAST_Z:g} is drawn at the bottom. "
        f"{_ZOOM}"
    )
    what = "Scores of the three stages of every run over steps"
    return card(
        "Stage scores, each run against its own past",
        paper.chart(partial(draw_stages, c), what, "steps"),
        tip=tip,
    )


def draw_stages(c: Comparison, theme: Theme) -> go.Figure:
    """Draw the scores of the three stages over steps, one line per run."""
    tracks = [Track(s.label, x := s.cache.steps()["step"], x) for s in c.runs]
    panels = [
        Panel(title, "", _column(c, f"stage{i}_score"), 150, _LEAST_Z, ALERT)
        for i, title in enumerate(STAGES, 1)
    ]
    return overlay(tracks, panels, theme)


def _column(c: Comparison, name: str) -> list[np.ndarray]:
    return [s.cache.steps()[name] for s in c.runs]


def _rings(run: ComparedRun) -> list[Ring]:
    steps = run.cache.steps()
    superseded = run.cache.superseded()
    out = []
    for recorded, _ in run.spikes:
        spike: Any = recorded.spike
        score = f", {spike.score:.1f} robust σ" if np.isfinite(spike.score) else ""
        kind = spike.kind if spike.kind in SPIKES else "spike"
        text = f"{run.label}: {kind} at step {integer(recorded.onset)}"
        text += f", peak at {number(spike.peak)}{score}"
        out.append(
            Ring(recorded.onset, loss_at(steps, superseded, recorded.attempt, recorded.onset), text)
        )
    return out
