"""The report of one run: what it is, how it stands, what happened to its loss and why, and its
geometry over depth.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import plotly.graph_objects as go
from dash import html

from geodiag.cascade.explain import Cascade
from geodiag.dashboard.cascade.selection import cascade_of
from geodiag.dashboard.components.components import card, notice
from geodiag.dashboard.components.frame import legend
from geodiag.dashboard.components.layer_select import layer_of
from geodiag.dashboard.components.text import integer, metric, metric_help, utc
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.figures.style import Theme
from geodiag.dashboard.pages import activations, gain, overview, routing
from geodiag.dashboard.reports import spike_sections, summary, tables
from geodiag.dashboard.reports.html_file import HtmlFile, mark
from geodiag.dashboard.url.live_figures import step_extent
from geodiag.dashboard.url.url_state import View
from geodiag.health import Health, health
from geodiag.jsonable import jsonable
from geodiag.metrics.registry import headlines
from geodiag.run import Run
from geodiag.spikes.recorded import spikes_of

MOST_SPIKES = 8
"""Spikes whose cascade is told: the worst ones. Each costs about half a second, and a page has an
end.
"""
_COLUMNS = (
    "Rows are layers, the first on top; columns are steps, or the worst of a few steps where there are very many. "
    "Drag to zoom in time, double click for all: every chart of the run follows."
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report tells, looked up once."""

    cache: RunCache
    health: Health
    cascades: tuple[Cascade, ...]
    """Of the worst spikes, in time."""
    untold: int
    """Spikes beyond those."""

    def as_json(self) -> dict[str, Any]:
        """What `geodiag show --json` says of the key metrics, and more of the run; see `geodiag
        report --help`.
        """
        said = self.cache.run.manifest
        more = {
            "name": self.cache.run.name,
            "model": said.get("found"),
            "config": said.get("config"),
        }
        more |= {"versions": said.get("versions"), "cascades": [c.as_json() for c in self.cascades]}
        return self.health.as_json() | jsonable(more | {"untold": self.untold})

    def html(self, now: float) -> str:
        """The file. `now` is when it was made, in seconds since 1970."""
        cache, run = self.cache, self.cache.run
        paper = HtmlFile(f"{run.name} · geodiag report")
        cache.grids(
            "layers", *_component_value(cache)
        )  # one reading of a long table instead of five
        sections = [
            ("health", "Health", _summary(self)),
            ("loss", "Loss", _loss(cache, paper)),
            ("cascades", "Cascades", spike_sections.told(cache, paper, self.cascades, self.untold)),
            ("gain", "Gain", _gain(self, paper)),
            ("routing", "Routing", _routing(cache, paper)),
            ("activations", "Activations", _activations(cache, paper)),
            (
                "worst",
                "Worst values",
                card("The worst of each key metric", tables.key_table(self.health)),
            ),
            ("events", "Events", tables.event_table(cache)),
            ("run", "The run", html.Div(tables.manifest(cache), className="column")),
        ]
        head = [
            html.Span([mark(), "geodiag"], className="brand"),
            html.Span(run.name, className="crumb here"),
        ]
        made = f"geodiag report of {run.url}, {utc(now)} UTC."
        return paper.html(sections, head, made)


def report(run: Run) -> Report:
    """Looks at a run, which may be training, by its newest attempt."""
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
    """What the charts of all steps are drawn from."""
    of_lines = [name for _, names in (*routing.LINES, *activations.LINES) for name in names]
    return list(
        dict.fromkeys([*gain.chosen_metrics(cache, View()), "flip_rate", "gate_amax", *of_lines])
    )


def _summary(r: Report) -> list:
    told = r.cache, r.health, r.cascades
    return [summary.head(*told), html.Div(summary.tiles(*told), className="tiles")]


def _loss(cache: RunCache, paper: HtmlFile) -> html.Section:
    keys = html.Div(legend(cache, "/overview"), className="keys")
    chart = paper.chart(
        partial(_timeline, cache), "Loss, gradient norm and stages over steps", "run"
    )
    return card(
        "Loss, gradient, stages",
        keys,
        chart,
        tip=f"{metric_help(metric('steps', 'loss'))} {overview.STAGES} {_COLUMNS}",
    )


def _timeline(cache: RunCache, theme: Theme) -> go.Figure:
    """The overview's, on the same stretch of steps as the maps below it."""
    fig, ends = overview.draw_timeline(cache, View(), theme), step_extent(cache)
    return fig.update_xaxes(range=[ends[0] - 0.5, ends[1] + 0.5]) if ends else fig


def _gain(r: Report, paper: HtmlFile) -> html.Div:
    worst = r.health.composite.worst
    step = worst.step if worst else None
    cache, view = r.cache, View(step=step)
    name = gain.QUANTITIES[gain.quantity(cache, view)][0]
    when = f"at step {integer(step)}" if step is not None else "at the newest step"
    lacks = (
        []
        if cache.has_maps()
        else [notice("No hyper-connections, so no residual maps and no composite gain.")]
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
        f"Down the stack, {when}",
        paper.chart(partial(gain.draw_profile, cache, view), f"{name} over depth {when}"),
        tip="Every site at the step of the worst composite gain, or else at the newest. Forward gains multiply from "
        "the input, backward gains from the output.",
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
        [card("Flip rate", flips, tip=_COLUMNS), card(f"The router of layer {layer}", lines)],
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
        [card("Largest gate", heat, tip=_COLUMNS), card(f"The experts of layer {layer}", lines)],
        className="column",
    )
