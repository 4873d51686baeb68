"""The comparison of runs as a page: losses on one axis, what stands better where, stages, spikes,
settings.
"""

from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
from dash import html

from geodiag.dashboard.components.components import card, notice
from geodiag.dashboard.components.text import integer, metric, metric_help, number, utc
from geodiag.dashboard.figures.event_marks import draw_superseded
from geodiag.dashboard.figures.run_overlay import Panel, Ring, Track, overlay
from geodiag.dashboard.figures.style import Theme
from geodiag.dashboard.figures.timeline import loss_at
from geodiag.dashboard.reports import comparison_tables
from geodiag.dashboard.reports.comparison import ComparedRun, Comparison
from geodiag.dashboard.reports.html_file import HtmlFile, mark
from geodiag.health import ALERT, SPIKES

_ZOOM = "Drag to zoom, double click for all; a click on a name hides its run."
_LEAST_Z = 2.0
"""Stage scores below are the noise of a worst-of-many, in every run."""


def page(c: Comparison, now: float) -> str:
    """The file. `now` is when it was made, in seconds since 1970."""
    names = [s.label for s in c.runs]
    title = " against ".join(names) if len(names) == 2 else f"{len(names)} runs"
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
        html.Span([mark(), "geodiag"], className="brand"),
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
        tip=f"{metric_help(metric('steps', 'loss'))} Rings are spikes; grey lines, steps that were rolled back. {_ZOOM}",
    )
    unknown = [s.label for s in c.runs if s.tokens() is None]
    if len(unknown) == len(c.runs):
        return html.Div(steps)
    lacks = (
        [notice(f"Not every step of {', '.join(unknown)} says how many tokens it had.")]
        if unknown
        else []
    )
    tokens = card(
        "Loss over tokens", *lacks,
        paper.chart(partial(draw_losses_over_tokens, c), "Loss of every run over tokens"), tip=_ZOOM,
    )  # fmt: skip
    return html.Div([steps, tokens], className="column")


def draw_losses(c: Comparison, theme: Theme) -> go.Figure:
    """Loss and gradient norm over steps."""
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
    """The same losses, by how much each run had read; runs that do not say are left out."""
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
        f"How far the worst layer stands from its own past. The dotted line is {ALERT:g} robust z: a stage that is "
        f"above it for three steps has left its history. Noise, up to {_LEAST_Z:g}, lies on the ground. {_ZOOM}"
    )
    what = "Scores of the three stages of every run over steps"
    return card(
        "Stages, each run against its own past",
        paper.chart(partial(draw_stages, c), what, "steps"),
        tip=tip,
    )


def draw_stages(c: Comparison, theme: Theme) -> go.Figure:
    """The scores of the three stages over steps, a line a run."""
    tracks = [Track(s.label, x := s.cache.steps()["step"], x) for s in c.runs]
    titles = ("1 curvature", "2 chart", "3 amplification")
    panels = [
        Panel(title, "", _column(c, f"stage{i}_score"), 150, _LEAST_Z, ALERT)
        for i, title in enumerate(titles, 1)
    ]
    return overlay(tracks, panels, theme)


def _column(c: Comparison, name: str) -> list[np.ndarray]:
    return [s.cache.steps()[name] for s in c.runs]


def _rings(side: ComparedRun) -> list[Ring]:
    steps, superseded, out = side.cache.steps(), side.cache.superseded(), []
    for seen, _ in side.spikes:
        spike: Any = seen.spike
        score = f", {spike.score:.1f} robust σ" if np.isfinite(spike.score) else ""
        kind = spike.kind if spike.kind in SPIKES else "spike"
        text = f"{side.label}: {kind} at step {integer(seen.onset)}, peak at {number(spike.peak)}{score}"
        out.append(Ring(seen.onset, loss_at(steps, superseded, seen.attempt, seen.onset), text))
    return out
