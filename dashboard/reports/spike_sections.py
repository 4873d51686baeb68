"""The spikes of a report: verdict, cascade figure, series and evidence of each."""

from functools import partial
from typing import Any

from dash import html

from geodiag.cascade.explain import Cascade
from geodiag.dashboard.cascade import verdict_card
from geodiag.dashboard.cascade.selection import most_unusual_step
from geodiag.dashboard.components.basic import aria, card, notice
from geodiag.dashboard.components.text import integer, number
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.pages import cascade as cascade_page
from geodiag.dashboard.reports.html_file import HtmlFile
from geodiag.dashboard.reports.tables import hint, table
from geodiag.dashboard.url.url_state import View


def cascade_sections(
    cache: RunCache, paper: HtmlFile, cascades: tuple[Cascade, ...], untold: int
) -> list[Any]:
    """Return one block per spike; without any spike the most unusual step."""
    more = (
        f"{untold:,} more spike{'s' * (untold != 1)} not explained here: "
        "geodiag cascade RUN explains all of them."
    )
    if not cascades:
        return [card("Spikes", notice(more))] if untold else [_without_spike(cache, paper)]
    links = [
        html.Span(
            html.A(f"step {integer(c.spike_onset)}", href=f"#spike-{c.spike_onset}"),
            className="choice",
        )
        for c in cascades
    ]
    strip = html.Nav(links, className="choices", **aria("spikes of this run"))
    head = [strip] if len(cascades) > 1 else []
    return [
        *head,
        *([notice(more)] if untold else []),
        *(_block(cache, paper, c) for c in cascades),
    ]


def _block(cache: RunCache, paper: HtmlFile, found: Cascade) -> html.Div:
    view = View(spike=found.spike_onset)
    at = f"step {integer(found.spike_onset)}"
    cascade_card = card(
        "From the origin to the loss",
        paper.chart(
            partial(cascade_page.draw_picture, cache, view),
            f"The cascade behind {at}: loss and stages over steps",
        ),
        tip=cascade_page.PICTURE,
    )
    series_card = card(
        "At the origin" if found.onset is not None else "Highest stage scores",
        paper.chart(
            partial(cascade_page.draw_series, cache, view), f"Series behind the cascade of {at}"
        ),
        paper.chart(
            partial(cascade_page.draw_experts, cache, view), f"Experts of its layer around {at}"
        ),
        tip="The metrics behind the stage; the band is their usual range before. Below: the "
        "experts of the layer.",
    )
    return html.Div(
        [
            verdict_card.verdict_card(cache, view, found),
            html.Div(
                [
                    html.Div([cascade_card, *_evidence(found)], className="column"),
                    html.Div(series_card, className="side"),
                ],
                className="split wide-side",
            ),
        ],
        id=f"spike-{found.spike_onset}",
        className="spike",
    )


def _evidence(found: Cascade) -> list[html.Section]:
    rows = [
        [
            r["stage"],
            r["where"],
            hint(r["metric"], r["help"]),
            integer(r["step"]),
            r["value"],
            r["usual"],
            "≥ 1000" if r["score"] >= 1000 else number(r["score"], 3),
        ]
        for r in verdict_card.evidence_rows(found)
    ]
    heads = ["stage", "where", "metric", "from step", "value", "usually", "robust z"]
    return (
        [
            card(
                "Evidence",
                table(heads, rows, (3, 4, 5, 6), "evidence"),
                tip="Metrics that left their usual range at the origin.",
            )
        ]
        if rows
        else []
    )


def _without_spike(cache: RunCache, paper: HtmlFile) -> html.Section:
    """Return the section of a run without a spike: its most unusual step."""
    unusual = most_unusual_step(cache)
    if unusual is None:
        return card(
            "No spike", notice("The loss never left its trend, and there are no stage scores.")
        )
    step, stage, score = unusual
    text = (
        f"The loss never left its trend. The most unusual step is {integer(step)}: "
        f"stage {stage} at {score:.1f} robust z."
    )
    view = View(steps=(max(0, step - 120), step + 60), stage=stage)
    return card(
        "No spike",
        html.P(text, className="words"),
        paper.chart(
            partial(cascade_page.draw_picture, cache, view), f"Loss and stages around step {step}"
        ),
        tip=cascade_page.PICTURE,
    )
