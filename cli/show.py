"""`geodiag show`: print the health of one run on one screen."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from geodiag.cli.output import STATUS_STYLE, number, place, print_json, prose, screen

if TYPE_CHECKING:
    from rich.console import RenderableType

    from geodiag.health import Health
    from geodiag.run import Run

_COLUMNS: tuple[tuple[str, int, Literal["left", "right"]], ...] = (
    ("", 22, "left"),
    ("worst", 16, "right"),
    ("where", 24, "left"),
    ("healthy", 0, "left"),
)
"""Heading, least width and alignment; together they fit a terminal of 80 columns."""


def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory; a path or a URL.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON with all metrics.")] = False,
) -> None:
    """Show the health of a run: the worst value of each key metric, where and when."""
    from geodiag.health import health
    from geodiag.metrics.registry import headlines
    from geodiag.run import open_run

    opened = open_run(run)
    shown = None if json else {name for names in headlines().values() for name in names}
    found = health(opened, shown)
    if json:
        print_json(found.as_json())
        return
    for part in (_head(found), *_stages(found), *_tail(found), *_why(opened)):
        screen().print(part)


def _head(h: "Health") -> str:
    from rich.markup import escape

    f = h.found
    step = "no step yet" if h.last_step is None else f"last step {h.last_step:,}"
    return (
        f"[bold]{escape(h.run)}[/]\n"
        f"[{STATUS_STYLE[h.status]}]{h.status}[/]  {step}  loss {number(h.last_loss)}\n"
        f"records {f['sites']} residual sites, {f['routers']} routers, {f['experts']} experts"
        + "".join(f"\n[dim]{escape(line)}[/]" for line in h.missing)
    )


def _stages(h: "Health") -> list["RenderableType"]:
    from rich.table import Table

    from geodiag.metrics.registry import headlines

    parts: list[RenderableType] = []
    for title, names in headlines().items():
        known = [n for n in names if n in h.worst]
        stage = title[6] if title.startswith("Stage") else None
        verdict = _verdict(h, int(stage), known) if stage else ""
        first = not parts  # only the first table has a header: the columns align with it
        table = Table(
            box=None, show_header=first, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0)
        )
        for name, width, side in _COLUMNS:
            table.add_column(name if first else "", min_width=width, justify=side, no_wrap=True)
        for name in known:
            table.add_row(*_row(h, name))
        parts.append(
            f"\n[bold]{title}[/]{verdict}" + ("" if known else "  [dim]nothing measured[/]")
        )
        if known:
            parts.append(table)
        if stage == "3":
            parts.append(composite_gain_text(h))
    return parts


def _verdict(h: "Health", stage: int, known: list[str]) -> str:
    """Return whether the stage was calm; empty if neither its score nor its metrics show it."""
    left = h.left[stage]
    if left is not None:
        return f"  [red]outside its own history from step {left:,} on[/]"
    worst = [h.worst[name] for name in known if not name.endswith("_score")]
    not_finite = [w.step for w in worst if not math.isfinite(w.value)]
    if not_finite:
        return f"  [red]not finite from step {min(not_finite):,} on[/]"
    return "  [green]within its own history[/]" if f"stage{stage}_score" in h.worst else ""


def _row(h: "Health", name: str) -> tuple[str, str, str, str]:
    from geodiag.health import outside
    from geodiag.metrics.schema import METRICS

    table = "steps" if ("steps", name) in METRICS else "layers"
    metric = METRICS[table, name]
    worst = h.worst[name]
    bad = outside(name, worst, table)
    value = number(worst.value, metric.unit)
    low, high = metric.healthy or (None, None)
    healthy = f"≤ {high:g}" if high is not None else f"≥ {low:g}" if low is not None else ""
    where = ", ".join(w for w in (f"step {worst.step:,}", place(worst.layer, worst.site)) if w)
    return name, f"[red]{value}[/]" if bad else value, where, healthy


def composite_gain_text(h: "Health") -> str:
    """Return one sentence on amplification: the worst composite gain and its verdict."""
    c = h.composite
    if c.worst is None:
        if h.problems:
            return "composite gain: the recorded residual maps could not be read"
        why = "this model has no hyper-connections, or no step was sampled"
        return f"composite gain: no residual maps measured; {why}"
    where = f"{c.direction}, step {c.worst.step:,}, {place(c.worst.layer, c.worst.site)}"
    gain = number(c.worst.value, "×")
    if not math.isfinite(c.worst.value):
        return f"[red]composite gain is {gain}[/] ({where})"
    if c.verdict == "within":
        explained = number(c.bound, "×")
        verdict = "[green]composite gain stayed within the truncation error[/]"
        return f"{verdict}: {gain} at most, {explained} explained"
    if c.verdict == "flat":
        return f"[green]composite gain stayed near 1[/]: {gain} at most"
    return f"[red]composite gain grew to {gain}[/] ({where})"


def _tail(h: "Health") -> list["RenderableType"]:
    from rich.text import Text

    parts: list[RenderableType] = [f"\n[bold]Spikes[/]  {len(h.spikes) or 'none'}"]
    parts += [prose(f"step {e['step']:,}: {e['message']}", indent=2) for e in h.spikes[-5:]]
    parts += [
        Text(f"not read: {piece}: {why}", style="yellow") for piece, why in h.problems.items()
    ]
    return parts


def _why(run: "Run") -> list["RenderableType"]:
    """Return the explanation of the worst spike."""
    from geodiag.cascade.explain import explain
    from geodiag.spikes.recorded import spikes_of

    if not spikes_of(run):
        return []
    worst = explain(run)
    return [f"\n[bold]Why[/]  step {worst.spike_onset:,}", prose(worst.words, indent=2)]
