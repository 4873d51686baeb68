"""Tables of a comparison: the runs, their key metrics, their spikes, their differing settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from dash import html

from geodiag.dashboard.components.basic import badge, notice
from geodiag.dashboard.components.frame import problems
from geodiag.dashboard.components.text import integer, metric_help, number, utc
from geodiag.dashboard.figures.run_overlay import stroke
from geodiag.dashboard.figures.style import DARK, LIGHT
from geodiag.dashboard.reports.comparison import ComparedRun, Comparison
from geodiag.dashboard.reports.tables import hint, metric_of, place, setting_text, table, value
from geodiag.metrics.registry import headlines

_LIST = 8
"""A longer list is shown as its length, its first and its last item."""
METRICS_TIP = (
    "Worst: the worst value of all steps and layers. Newest: the worst layer at the last sample. "
    "✓ marks the better value if the difference is visible."
)


_HEADS = (
    "run", "status", "last step", "tokens", "shared loss", "newest loss", "spikes", "model",
    "started, UTC",
)  # fmt: skip


def head(c: Comparison, title: str) -> html.Section:
    """Return the card with the runs, their status, and the mean loss over common steps."""
    shared = c.shared()
    rows = [_run_row(c, i, shared["loss"]) for i in range(len(c.runs))]
    note = "These runs have no step in common."
    if shared["last_step"] is not None:
        note = (
            f"shared loss: mean over the {shared['steps']} newest steps that all runs have, "
            f"up to step {integer(shared['last_step'])}"
        )
    unread = [html.Div([html.B(s.label), *problems(s.cache)]) for s in c.runs if s.cache.problems()]
    return html.Section(
        [html.H1(title), table(_HEADS, rows, (2, 3, 4, 5, 6)), notice(note), *unread],
        className="card runs-of",
    )


def _run_row(c: Comparison, i: int, losses: Sequence[float | None]) -> list[Any]:
    """The row of run number `i`; the best of the shared `losses` is marked if it is visible."""
    run = c.runs[i]
    tokens = run.tokens()
    names = [run.cache.setting(key) for key in ("residual", "size")]
    model = ", ".join(str(name) for name in names if name)
    known = [v for v in losses if v is not None]
    differ = len({number(v) for v in known}) > 1
    best = differ and number(losses[i]) == number(min(known))
    return [
        named(c, i),
        badge(run.health.status),
        integer(run.health.last_step),
        "–" if tokens is None else _short(float(tokens[-1])),
        _better(number(losses[i]), best),
        number(run.health.last_loss),
        str(len(run.spikes)),
        model or str(run.cache.manifest_section("found").get("family") or "–"),
        utc(run.cache.run.manifest.get("created"), "%Y-%m-%d %H:%M"),
    ]


def metrics(c: Comparison) -> html.Div:
    """Return the table of key metrics: the worst and the newest value of every run."""
    metrics_by_name = c.metrics()
    rows: list[Any] = []
    for title, names in headlines().items():
        known = [n for n in names if n in metrics_by_name]
        if known:
            rows.append(html.Tr(html.Th(title, colSpan=1 + 2 * len(c.runs), scope="rowgroup")))
        for name in known:
            cells: list[Any] = [hint(name, metric_help(metric_of(name)))]
            for i, s in enumerate(c.runs):
                cells += _cells(s, i, name, metrics_by_name[name]["better"])
            rows.append(cells)
    heads: list[Any] = [""]
    for i in range(len(c.runs)):
        heads += [html.Span([named(c, i), " worst"]), "newest"]
    return table(heads, rows, range(1, len(heads)), "metrics-of")


def _cells(run: ComparedRun, i: int, name: str, better: Mapping[str, Sequence[int]]) -> list[Any]:
    metric = metric_of(name)
    worst = run.health.worst.get(name)
    if worst is None:
        return ["–", "–"]
    text = [
        _better(value(worst.value, metric), i in better["worst"]),
        html.Span(place(worst), className="at"),
    ]
    return [html.Div(text), _better(value(run.last.get(name), metric), i in better["last"])]


def spikes(c: Comparison) -> Any:
    """Return the table of all spikes; the worst ones with their cascade in words."""
    rows = []
    for i, s in enumerate(c.runs):
        if not s.spikes:
            rows.append([named(c, i), html.Span("none", className="soft"), "", "", "", ""])
        for recorded, words in s.spikes:
            assert recorded.spike is not None
            end = "not over" if recorded.spike.end is None else integer(recorded.spike.end)
            more = words or html.Span("see geodiag cascade RUN", className="soft")
            rows.append(
                [
                    named(c, i),
                    integer(recorded.onset),
                    integer(recorded.spike.peak),
                    end,
                    html.Span(recorded.spike.kind, className=f"kind kind-{recorded.spike.kind}"),
                    more,
                ]
            )
    return table(["run", "onset", "peak", "end", "kind", "cascade"], rows, (1, 2, 3), "spikes-of")


def settings(c: Comparison, differences: Mapping[str, Sequence[Any]]) -> Any:
    """Return the table of settings that differ between the runs."""
    if not differences:
        return notice("These runs have the same settings.")
    rows = [[html.Code(name), *map(_setting_cell, values)] for name, values in differences.items()]
    return table(["setting", *(named(c, i) for i in range(len(c.runs)))], rows, name="settings-of")


def named(c: Comparison, i: int) -> html.Span:
    """Return the name of a run beside a sample of its line."""
    return html.Span([swatch(i), c.runs[i].label], className="run-name")


def swatch(i: int) -> html.I:
    """Return a sample of the line of run number `i`, in both themes."""
    (light, dash), (dark, _) = stroke(i, LIGHT), stroke(i, DARK)
    kind = {"solid": "solid", "dash": "dashed", "dot": "dotted"}[dash]
    return html.I(
        className="swatch", style={"--light": light, "--dark": dark, "borderTopStyle": kind}
    )


def _better(text: str, best: bool) -> Any:
    return (
        html.B([html.Span("✓ ", title="the better value"), text], className="calm")
        if best
        else text
    )


def _setting_cell(setting: Any) -> Any:
    if isinstance(setting, list) and len(setting) > _LIST:
        return f"{len(setting)}: {setting[0]} … {setting[-1]}"
    return html.Span("–", className="soft") if setting is None else setting_text(setting)


def _short(n: float) -> str:
    """`1.23 M`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return f"{n:.3g}"
