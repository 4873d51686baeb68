"""What a run is and how it stands, as words and tables: the parts of a report without a chart."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from dash import html

from geodiag.cascade.words import where
from geodiag.dashboard.components.components import card, notice
from geodiag.dashboard.components.text import factor, integer, metric_help, number, percent, utc
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.events import KINDS
from geodiag.health import Health, Worst, outside
from geodiag.metrics.registry import headlines
from geodiag.metrics.schema import METRICS, SCHEMA_VERSION, Metric

MOST_EVENTS = 300
"""Rows of a trail that somebody may still read; the newest are shown."""
_SILENT = "The run does not say."
Rows = Sequence[Sequence[Any] | html.Tr]


def grid(heads: Sequence[Any], rows: Rows, numbers: Sequence[int] = (), name: str = "") -> html.Div:
    """A table, of cells or of ready rows; the columns in `numbers` stand to the right.

    What is too wide for the window moves inside it, under the finger.
    """
    sides = ["num" if i in numbers else None for i in range(len(heads))]
    first = html.Thead(
        html.Tr([html.Th(h, className=s, scope="col") for h, s in zip(heads, sides, strict=True)])
    )
    rest = [
        row
        if isinstance(row, html.Tr)
        else html.Tr([html.Td(c, className=s) for c, s in zip(row, sides, strict=True)])
        for row in rows
    ]
    return html.Div(
        html.Table([first, html.Tbody(rest)], className=f"plain {name}".strip()), className="sheet"
    )


def hint(text: str, why: str, name: str = "") -> html.Span:
    """A word in a table with its explanation, in the browser's own way: a table cuts off what hangs
    over it.
    """
    return html.Span(text, title=why, className=f"hint {name}".strip())


def metric_of(name: str) -> Metric:
    """A key metric: of the step, else of the layers."""
    return METRICS.get(("steps", name)) or METRICS["layers", name]


def value(v: float | None, metric: Metric) -> str:
    """A value in its unit, as the dashboard writes it."""
    if v is not None and not math.isfinite(v):
        return "not finite"
    said = {"share": percent, "×": factor}.get(metric.unit, number)(v)
    return (
        said
        if v is None or metric.unit in ("share", "×", "1", "score", "")
        else f"{said} {metric.unit}"
    )


def place(worst: Worst) -> str:
    """`step 161 · layer 1 · ffn`."""
    spot = where(worst.layer, worst.site, worst.expert)
    return " · ".join([f"step {integer(worst.step)}", *(spot.split(", ") if spot else [])])


def key_table(health: Health) -> html.Div:
    """The worst of each key metric, by stage; what lies outside its healthy range is marked."""
    rows: list[Any] = []
    for title, names in headlines().items():
        known = [n for n in names if n in health.worst]
        stage = int(title[6]) if title.startswith("Stage") else None
        stage_status = (
            _stage_status(health, stage)
            if known
            else html.Span("nothing measured", className="soft")
        )
        rows.append(html.Tr(html.Th([title, stage_status], colSpan=4, scope="rowgroup")))
        rows += [_row(n, health.worst[n]) for n in known]
    return grid(["", "worst", "where", "healthy"], rows, (1,), "worst")


def _row(name: str, worst: Worst) -> Sequence[Any]:
    metric = metric_of(name)
    bad = outside(name, worst, metric.table)
    low, high = metric.healthy or (None, None)
    healthy = f"≤ {high:,g}" if high is not None else f"≥ {low:g}" if low is not None else ""
    said = value(worst.value, metric)
    return [hint(name, metric_help(metric)), html.B(f"! {said}", className="alarm") if bad else said,
            place(worst), healthy]  # fmt: skip


def _stage_status(health: Health, stage: int | None) -> Any:
    if stage is None:
        return ""
    left = health.left[stage]
    if left is not None:
        return html.B(f"! left its own history at step {integer(left)}", className="alarm")
    return (
        html.Span("within its own history", className="calm")
        if f"stage{stage}_score" in health.worst
        else ""
    )


def event_table(cache: RunCache) -> html.Section:
    """Everything that happened, oldest first."""
    events = cache.events()
    shown = events[-MOST_EVENTS:]
    rows = [
        [integer(e["step"]), hint(e["kind"], KINDS.get(e["kind"], ""), f"kind kind-{e['kind']}"),
         e["message"] or "", " · ".join(where(e["layer"], e["site"], e["expert"]).split(", ")),
         str(e["attempt"] or 0), utc(e["time"])]
        for e in shown
    ]  # fmt: skip
    heads = ["step", "kind", "message", "where", "attempt", "time, UTC"]
    left_out = len(events) - len(shown)
    said = (
        [notice(f"{left_out:,} older events are left out; the table events of the run has them.")]
        if left_out
        else []
    )
    return card(
        "What happened", *said, grid(heads, rows, (0, 4), "trail") if rows else notice("Nothing.")
    )


def manifest(cache: RunCache) -> list:
    """The run's own words about itself: model, versions, command, configuration."""
    said = cache.run.manifest
    found = [
        [k.replace("_", " "), setting_text(v)]
        for k, v in cache.manifest_section("found").items()
        if v not in ([], None)
    ]
    command = said.get("command")
    began: Rows = [
        ["run", cache.run.url],
        ["began, UTC", utc(said.get("created"))],
        [
            "attempts",
            ", ".join(f"{a} from step {integer(s)}" for a, s in cache.attempt_starts().items()),
        ],
        ["ranks", setting_text(said.get("world_size", 1))],
        ["command", html.Code(shlex.join(map(str, command)) if isinstance(command, list) else "–")],
        ["schema", f"{setting_text(said.get('schema_version'))} (this geodiag: {SCHEMA_VERSION})"],
        *([f"{k} version", setting_text(v)] for k, v in cache.manifest_section("versions").items()),
    ]
    settings = [
        [html.Code(k), setting_text(v)]
        for k, v in flatten(cache.manifest_section("config")).items()
    ]
    long = html.Details(
        [html.Summary(f"{len(settings)} settings"), grid(["setting", "value"], settings)]
    )
    pair = [
        card(
            "The model, as it was found",
            grid(["", ""], found, name="facts-of") if found else notice(_SILENT),
        ),
        card("The training", grid(["", ""], began, name="facts-of")),
    ]
    return [
        html.Div(pair, className="pair"),
        card("Configuration", long if settings else notice(_SILENT)),
    ]


def flatten(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by their dotted names; lists are values."""
    out: dict[str, Any] = {}
    for key, said in config.items():
        name = f"{above}{key}"
        out |= flatten(said, f"{name}.") if isinstance(said, dict) and said else {name: said}
    return out


def setting_text(said: Any) -> str:
    """A setting's value, as one would say it."""
    if said is None or isinstance(said, bool):
        return {None: "none", True: "yes", False: "no"}[said]
    return (", ".join(map(str, said)) or "none") if isinstance(said, list) else str(said)
