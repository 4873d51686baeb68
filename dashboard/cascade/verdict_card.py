"""The verdict of a cascade: links to all spikes, the verdict card, the rows of the evidence."""

from typing import Any
from urllib.parse import quote

from dash import dcc, html

from geodiag.cascade.explain import Cascade
from geodiag.cascade.verdict_text import fix_sentence, place_label
from geodiag.dashboard.cascade.selection import (
    SpikeOrWarning,
    chosen_step,
    most_unusual_step,
    spikes_and_warnings,
)
from geodiag.dashboard.components.basic import aria, notice, tip
from geodiag.dashboard.components.text import METRICS, integer, number, percent
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.figures.cascade import STAGES
from geodiag.dashboard.url.url_state import View

_KINDS = {
    "spike": "Spike",
    "divergence": "Divergence",
    "nonfinite": "Loss not finite",
    "early_warning": "Early warning",
}
_NUMBER = {"filter": "agNumberColumnFilter", "type": "rightAligned"}
_COMMAS = {"function": "params.value == null ? '–' : d3.format(',')(params.value)"}
COLUMNS: list[dict[str, Any]] = [
    {"field": "stage", "headerName": "stage", "width": 80},
    {"field": "where", "headerName": "where", "width": 190},
    {"field": "metric", "headerName": "metric", "flex": 1, "minWidth": 170, "tooltipField": "help"},
    {"field": "step", "headerName": "from step", "width": 106,
     "valueFormatter": _COMMAS, **_NUMBER},
    {"field": "value", "headerName": "value", "width": 104, "type": "rightAligned"},
    {"field": "usual", "headerName": "usually", "width": 104, "type": "rightAligned"},
    {"field": "score", "headerName": "robust z", "width": 104,
     "valueFormatter": {"function": "d3.format('.3g')(params.value)"}, **_NUMBER},
]  # fmt: skip


def spike_links(cache: RunCache, view: View) -> Any:
    """Return links to the spikes and warnings of the run; the selected one is marked."""
    candidates = spikes_and_warnings(cache)
    now = chosen_step(cache, view)
    links = [_link(cache, c.step, _name(cache, c), c.kind, c.step == now) for c in candidates]
    if now is not None and now not in [c.step for c in candidates]:
        links.append(_link(cache, now, f"step {integer(now)}", "step", True))
    unusual = most_unusual_step(cache) if not candidates else None
    if unusual is not None and unusual[0] != now:
        links.append(
            _link(cache, unusual[0], f"most unusual step {integer(unusual[0])}", "step", False)
        )
    return (
        html.Nav(links, className="choices", **aria("spikes and warnings of this run"))
        if links
        else None
    )


def verdict_card(cache: RunCache, view: View, found: Cascade | str | None) -> Any:
    """Return the card with the verdict in words, the origin, the confidence, the suggested fix."""
    if found is None:
        return html.Section(
            html.Div([html.H1("No spike so far"), html.P(_calm(cache))]), className="card verdict"
        )
    if isinstance(found, str):
        return html.Section(
            html.Div([html.H1("No cascade for this step"), notice(found)]), className="card verdict"
        )
    caveats = [notice(c, "warn") for c in found.caveats]
    warned = (found.spike_onset, "early_warning") in [
        (c.step, c.kind) for c in spikes_and_warnings(cache)
    ]
    return html.Section(
        [
            html.Div(
                [
                    html.H1(headline(found, warned)),
                    html.P(_without_defence(found), className="words"),
                    *caveats,
                ]
            ),
            html.Div([*_facts(found), *_others(view, found)], className="facts"),
        ],
        className="card verdict",
    )


def headline(found: Cascade, warned: bool = False) -> str:
    """Return the heading of a verdict: `Spike at step 1,251: an expert outlier`."""
    kind = (found.spike or {}).get("kind") or ("early_warning" if warned else None)
    what = _KINDS.get(str(kind))
    step = f"step {integer(found.spike_onset)}"
    return f"{what} at {step}: {_cause(found)}" if what else f"{step.capitalize()}: {_cause(found)}"


def evidence_rows(found: Cascade) -> list[dict[str, Any]]:
    """Return the rows of the evidence table."""
    out = []
    for i, e in enumerate(found.evidence):
        table = "experts" if e.expert is not None else "layers" if e.layer is not None else "steps"
        known = METRICS.get((table, e.metric)) or METRICS.get(("layers", e.metric))
        place = " · ".join(
            place_label(
                e.layer if e.layer is None or e.layer >= 0 else None, e.site, e.expert
            ).split(", ")
        )
        out.append({
            "id": str(i), "stage": e.stage or "–", "layer": e.layer, "where": place or "whole run",
            "metric": e.metric,
            "help": known.help if known else "", "step": e.step, "value": _value(e.value, e.unit),
            "usual": _value(e.usual, e.unit), "score": round(float(e.score), 2),
        })  # fmt: skip
    return out


def _cause(found: Cascade) -> str:
    if found.cause == "lr":
        return "the learning rate"
    if found.stage == "data":
        return f"the batch, {found.domain}" if found.domain else "the batch"
    if found.stage == 1:
        return "an expert outlier" if found.expert is not None else "extreme activations"
    if found.stage == 2:
        return "routing instability"
    return "amplification over depth" if found.stage == 3 else "no cause found inside the model"


def _facts(found: Cascade) -> list:
    place = place_label(found.layer, found.site, found.expert) or {
        "lr": "learning rate",
        "data": "batch",
    }.get(str(found.cause), "–")
    lead = (
        "–"
        if found.lead is None
        else "same step"
        if found.lead <= 0
        else f"{found.lead} step{'s' * (found.lead != 1)}"
    )
    share = round(100 * found.confidence)
    bar = html.Span(
        html.Span(style={"width": f"{share}%"}),
        className="meter",
        role="img",
        **aria(f"{share} %"),
    )
    return [
        _fact(
            "origin",
            place,
            "The first place where a metric left its usual range without an earlier cause.",
        ),
        _fact(
            "before the loss" if found.spike else "before this step",
            lead,
            "Steps from the origin to the step shown.",
        ),
        _fact(
            "confidence",
            [f"{found.confidence:.2f}", bar],
            "How much better this verdict explains the record than the next best one, from 0 to 1.",
        ),
        _fact(
            "suggested fix", found.defence or "–", "What prevents a cascade with such an origin."
        ),
    ]


def _without_defence(found: Cascade) -> str:
    """Return the words without the suggested fix, which is shown beside them."""
    return found.words.removesuffix(f" {fix_sentence(found)}")


def _fact(label: str, value: Any, text: str) -> Any:
    inside = [
        html.Span(label, className="tile-label"),
        html.Span(value, className="fact-value"),
    ]
    return tip(html.Div(inside, className="fact", tabIndex=0), text)


def _others(view: View, found: Cascade) -> list:
    if not found.alternatives:
        return []
    items: list[Any] = []
    for a in found.alternatives:
        place = " · ".join(place_label(a.layer, a.site, a.expert).split(", ")) or str(a.stage)
        text: list[Any] = [
            html.B(f"{a.confidence:.2f}"),
            f" {place}, stage {a.stage}, from step {integer(a.onset)}: {a.why}",
        ]
        linked = a.layer is not None and a.stage in STAGES
        cell = view.replaced(stage=a.stage, layer=a.layer, step=a.onset, spike=found.spike_onset)
        items.append(html.Li(dcc.Link(text, href=cell.query_string()) if linked else text))
    count = f"{len(items)} other possible origin{'s' * (len(items) != 1)}"
    return [html.Details([html.Summary(count), html.Ul(items)], className="others")]


def _name(cache: RunCache, choice: SpikeOrWarning) -> str:
    name = f"{_KINDS.get(choice.kind, choice.kind).lower()} {integer(choice.step)}"
    rolled_back = choice.attempt is not None and cache.as_of_attempt(choice.attempt) is not cache
    return f"{name} · attempt {choice.attempt}" if rolled_back else name


def _link(cache: RunCache, step: int, label: str, kind: str, here: bool) -> Any:
    target = f"/run/{quote(cache.run.name)}/cascade{View(spike=step).query_string()}"
    mark: Any = {"aria-current": "true"} if here else {}
    inside: list[Any] = [html.Span(className=f"dot choice-{kind}"), label]
    return html.Span(
        dcc.Link(inside, href=target), className="choice here" if here else "choice", **mark
    )


def _calm(cache: RunCache) -> str:
    if not len(cache.steps()["step"]):
        return "The cascade behind the first spike will be shown here."
    return (
        "The loss never left its trend. The maps show how far each layer is from its own past; "
        "click any cell for details."
    )


def _value(value: float, unit: str) -> str:
    return percent(value) if unit == "share" else number(value)
