"""Tables of a report: key metrics, events, model, training, configuration."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from dash import html

from geodiag.cascade.verdict_text import place_label
from geodiag.dashboard.components.basic import card, notice
from geodiag.dashboard.components.text import factor, integer, metric_help, number, percent, utc
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.events import KINDS
from geodiag.health import Health, Worst, outside
from geodiag.metrics.registry import headlines
from geodiag.metrics.schema import METRICS, SCHEMA_VERSION, Metric

MOST_EVENTS = 300
"""Most rows of the table of events; the newest are shown."""
_UNKNOWN = "Not in the manifest of this run."
Rows = Sequence[Sequence[Any] | html.Tr]


def table(
    heads: Sequence[Any], rows: Rows, numbers: Sequence[int] = (), name: str = ""
) -> html.Div:
    """Return a table of cells or of complete rows; the columns in `numbers` are right-aligned.

    A table that is wider than the window can be scrolled.
    """
    alignments = ["num" if i in numbers else None for i in range(len(heads))]
    first = html.Thead(
        html.Tr(
            [html.Th(h, className=s, scope="col") for h, s in zip(heads, alignments, strict=True)]
        )
    )
    rest = [
        row
        if isinstance(row, html.Tr)
        else html.Tr([html.Td(c, className=s) for c, s in zip(row, alignments, strict=True)])
        for row in rows
    ]
    return html.Div(
        html.Table([first, html.Tbody(rest)], className=f"plain {name}".strip()), className="sheet"
    )


def hint(text: str, why: str, name: str = "") -> html.Span:
    """Return a word with a browser tooltip, because a table cuts off tooltips of the page."""
    return html.Span(text, title=why, className=f"hint {name}".strip())


def metric_of(name: str) -> Metric:
    """Return a key metric of table `steps`, or else of table `layers`."""
    return METRICS.get(("steps", name)) or METRICS["layers", name]


def value(v: float | None, metric: Metric) -> str:
    """Format a value with its unit."""
    if v is not None and not math.isfinite(v):
        return "not finite"
    text = {"share": percent, "×": factor}.get(metric.unit, number)(v)
    has_unit = v is not None and metric.unit not in ("share", "×", "1", "score", "")
    return f"{text} {metric.unit}" if has_unit else text


def place(worst: Worst) -> str:
    """Return the place of a worst value: `step 161 · layer 1 · ffn`."""
    spot = place_label(worst.layer, worst.site, worst.expert)
    return " · ".join([f"step {integer(worst.step)}", *(spot.split(", ") if spot else [])])


def key_table(health: Health) -> html.Div:
    """Return the worst value of each key metric by stage; unhealthy values are marked."""
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
    return table(["", "worst", "where", "healthy"], rows, (1,), "worst")


def _row(name: str, worst: Worst) -> Sequence[Any]:
    metric = metric_of(name)
    bad = outside(name, worst, metric.table)
    low, high = metric.healthy or (None, None)
    healthy = f"≤ {high:,g}" if high is not None else f"≥ {low:g}" if low is not None else ""
    text = value(worst.value, metric)
    return [
        hint(name, metric_help(metric)),
        html.B(f"! {text}", className="alarm") if bad else text,
        place(worst),
        healthy,
    ]


def _stage_status(health: Health, stage: int | None) -> Any:
    if stage is None:
        return ""
    left = health.left[stage]
    if left is not None:
        return html.B(f"! unusual from step {integer(left)} on", className="alarm")
    return (
        html.Span("within its usual range", className="calm")
        if f"stage{stage}_score" in health.worst
        else ""
    )


def event_table(cache: RunCache) -> html.Section:
    """Return the table of events, oldest first."""
    events = cache.events()
    shown = events[-MOST_EVENTS:]
    rows = [
        [
            integer(e["step"]),
            hint(e["kind"], KINDS.get(e["kind"], ""), f"kind kind-{e['kind']}"),
            e["message"] or "",
            " · ".join(place_label(e["layer"], e["site"], e["expert"]).split(", ")),
            str(e["attempt"] or 0),
            utc(e["time"]),
        ]
        for e in shown
    ]
    heads = ["step", "kind", "message", "where", "attempt", "time, UTC"]
    left_out = len(events) - len(shown)
    note = f"{left_out:,} older events are not shown; table events of the run contains them."
    notes = [notice(note)] if left_out else []
    return card(
        "Events", *notes, table(heads, rows, (0, 4), "trail") if rows else notice("No events.")
    )


def run_facts(cache: RunCache) -> list:
    """Return cards with the model, the training and the configuration of a run."""
    manifest = cache.run.manifest
    found = [
        [k.replace("_", " "), setting_text(v)]
        for k, v in cache.manifest_section("found").items()
        if v not in ([], None)
    ]
    command = manifest.get("command")
    training: Rows = [
        ["run", cache.run.url],
        ["started, UTC", utc(manifest.get("created"))],
        [
            "attempts",
            ", ".join(f"{a} from step {integer(s)}" for a, s in cache.attempt_starts().items()),
        ],
        ["ranks", setting_text(manifest.get("world_size", 1))],
        ["command", html.Code(shlex.join(map(str, command)) if isinstance(command, list) else "–")],
        [
            "schema",
            f"{setting_text(manifest.get('schema_version'))} (this geodiag: {SCHEMA_VERSION})",
        ],
        *([f"{k} version", setting_text(v)] for k, v in cache.manifest_section("versions").items()),
    ]
    settings = [
        [html.Code(k), setting_text(v)]
        for k, v in flatten(cache.manifest_section("config")).items()
    ]
    long = html.Details(
        [html.Summary(f"{len(settings)} settings"), table(["setting", "value"], settings)]
    )
    pair = [
        card(
            "Model",
            table(["", ""], found, name="facts-of") if found else notice(_UNKNOWN),
        ),
        card("Training", table(["", ""], training, name="facts-of")),
    ]
    return [
        html.Div(pair, className="pair"),
        card("Configuration", long if settings else notice(_UNKNOWN)),
    ]


def flatten(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return settings by their dotted names; lists are values."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{above}{key}"
        out |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return out


def setting_text(value: Any) -> str:
    """Format the value of a setting: `yes`, `no`, `none`, `a, b`, or its text."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
