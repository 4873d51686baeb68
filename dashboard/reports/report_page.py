"""The report of one run: health, loss, the cascade behind each spike, metrics over depth."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import plotly.graph_objects as go
from dash import html

from geodiag.cascade.explain import Cascade
from geodiag.dashboard.cascade.selection import cascade_of
from geodiag.dashboard.components.basic import card, notice
from geodiag.dashboard.components.frame import legend
from geodiag.dashboard.components.layer_select import layer_of
from geodiag.dashboard.components.text import integer, metric, metric_help, utc
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.figures.style import Theme
from geodiag.dashboard.pages import activations, gain, overview, routing
from geodiag.dashboard.reports import spike_sections, summary, tables
from geodiag.dashboard.reports.html_file import HtmlFile, logo
from geodiag.dashboard.url.live_figures import step_extent
from geodiag.dashboard.url.url_state import View
from geodiag.health import Health, health
from geodiag.jsonable import jsonable
from geodiag.metrics.registry import headlines
from geodiag.run import Run
from geodiag.spikes.recorded import spikes_of

MOST_SPIKES = 8
"""Spikes whose cascade is explained, the worst ones. Each takes about half a second."""
_COLUMNS = (
    "Rows are layers, the first on top; columns are steps (in long runs the worst of a few steps). "
    "Drag to zoom all charts of the run in time, double click to reset."
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The data of a report."""

    cache: RunCache
    health: Health
    cascades: tuple[Cascade, ...]
    """The cascades of the worst spikes, in order of steps."""
    untold: int
    """Number of the other spikes."""

    def as_json(self) -> dict[str, Any]:
        """Return the object that `geodiag report --json` prints."""
        manifest = self.cache.run.manifest
        more = {
            "name": self.cache.run.name,
            "model": manifest.get("found"),
            "config": manifest.get("config"),
        }
        more |= {
            "versions": manifest.get("versions"),
            "cascades": [c.as_json() for c in self.cascades],
        }
        return self.health.as_json() | jsonable(more | {"untold": self.untold})

    def html(self, now: float) -> str:
        """Return the HTML of the report; `now` is the time of writing in seconds since 1970."""
        cache = self.cache
        run = cache.run
        paper = HtmlFile(f"{run.name} · geodiag report")
        cache.grids("layers", *_component_value(cache))  # one read of a long table instead of five
        sections = [
            ("health", "Health", _summary(self)),
            ("loss", "Loss", _loss(cache, paper)),
            (
                "cascades",
                "Cascades",
                spike_sections.cascade_sections(cache, paper, self.cascades, self.untold),
            ),
            ("gain", "Gain", _gain(self, paper)),
            ("routing", "Routing", _routing(cache, paper)),
            ("activations", "Activations", _activations(cache, paper)),
            (
                "worst",
                "Worst values",
                card("Worst value of each key metric", tables.key_table(self.health)),
            ),
            ("events", "Events", tables.event_table(cache)),
            ("run", "The run", html.Div(tables.run_facts(cache), className="column")),
        ]
        head = [
            html.Span([logo(), "geodiag"], className="brand"),
            html.Span(run.name, className="crumb here"),
        ]
        made = f"geodiag report of {run.url}, {utc(now)} UTC."
        return paper.html(sections, head, made)


def report(run: Run) -> Report:
    """Collect the data of a report on the newest attempt of a run; the run may be training."""
    cache = RunCache(run)
    worst = {s.onset: s.spike.score for s in spikes_of(run) if s.spike is not None}
    onsets = sorted(sorted(worst, key=lambda step: -worst[step])[:MOST_SPIKES])
    found = [c for c in (cascade_of(cache, step) for step in onsets) if isinstance(c, Cascade)]
    names = {name for names in headlines().values() for name in names}
    return Report(
        cache=cache,
        health=health(run, names),
        cascades=tuple(found),
        untold=len(worst) - len(found),
    )


def _component_value(cache: RunCache) -> list[str]:
    """Return the metrics in the charts of all steps."""
    of_lines = [name for _, names in (*routing.LINES, *activations.LINES) for name in names]
    return list(
        dict.fromkeys([*gain.chosen_metrics(cache, View()), "flip_rate", "gate_amax", *of_lines])
    )


def _summary(r: Report) -> list:
    known = r.cache, r.health, r.cascades
    return [summary.head(*known), html.Div(summary.tiles(*known), className="tiles")]


def _loss(cache: RunCache, paper: HtmlFile) -> html.Section:
    keys = html.Div(legend(cache, "/overview"), className="keys")
    chart = paper.chart(
        partial(_timeline, cache), "Loss, gradient norm and stages over steps", "run"
    )
    return card(
        "Loss, gradient norm, stages",
        keys,
        chart,
        tip=f"{metric_help(metric('steps', 'loss'))} {overview.STAGES} {_COLUMNS}",
    )


def _timeline(cache: RunCache, theme: Theme) -> go.Figure:
    """Draw the timeline of the overview, with the same range of steps as the maps below it."""
    fig = overview.draw_timeline(cache, View(), theme)
    ends = step_extent(cache)
    return fig.update_xaxes(range=[ends[0] - 0.5, ends[1] + 0.5]) if ends else fig


def _gain(r: Report, paper: HtmlFile) -> html.Div:
    worst = r.health.composite.worst
    step = worst.step if worst else None
    cache = r.cache
    view = View(step=step)
    name = gain.QUANTITIES[gain.quantity(cache, view)][0]
    when = f"at step {integer(step)}" if step is not None else "at the newest step"
    lacks = (
        []
        if cache.has_maps()
        else [notice("This model has no hyper-connections, so it has no residual maps.")]
    )
    main = card(
        f"{name.capitalize()} over layers and steps",
        *lacks,
        paper.chart(
            partial(gain.draw_heat, cache, view), f"{name} of every layer over steps", "run"
        ),
        tip=_COLUMNS,
    )
    deep = card(
        f"Over depth, {when}",
        paper.chart(partial(gain.draw_profile, cache, view), f"{name} over depth {when}"),
        tip="Every site at the step with the worst composite gain, else at the newest step. "
        "Forward gains multiply from the input, backward gains from the output.",
    )
    return html.Div(
        [html.Div(main, className="column"), html.Div(deep, className="side")],
        className="split wide-side",
    )


def _routing(cache: RunCache, paper: HtmlFile) -> html.Div:
    layer = layer_of(cache, View())
    flips = paper.chart(
        partial(routing.draw_flips, cache, View()), "Flip rate of every layer over steps", "run"
    )
    lines = paper.chart(
        partial(routing.draw_lines, cache, View()), f"Router of layer {layer} over steps", "run"
    )
    return html.Div(
        [
            card("Flip rate: changed expert choices", flips, tip=_COLUMNS),
            card(f"Router of layer {layer}", lines),
        ],
        className="column",
    )


def _activations(cache: RunCache, paper: HtmlFile) -> html.Div:
    layer = layer_of(cache, View())
    heat = paper.chart(
        partial(activations.draw_heat, cache, View()),
        "Largest gate of every layer over steps",
        "run",
    )
    lines = paper.chart(
        partial(activations.draw_lines, cache, View()),
        f"Activations of layer {layer} over steps",
        "run",
    )
    return html.Div(
        [
            card("Largest gate activation", heat, tip=_COLUMNS),
            card(f"Experts of layer {layer}", lines),
        ],
        className="column",
    )
