"""The replays of natural spikes as a table: one row per change."""

from collections.abc import Mapping, Sequence
from typing import Any

from geodiag.benchmarks.report import where
from geodiag.benchmarks.routing_measures import Mean

_TINY = "noise 1e-6"
_MEASURES = ("again", "peak", "excess", "last")


def summarise(rows: Sequence[Mapping[str, Any]], changes: Sequence[str]) -> list[dict[str, Any]]:
    """One row a change, over the spikes that every change was tried on."""
    spikes = {(r["seed"], r["onset"]): dict[str, Any]() for r in rows if r["change"]}
    for r in rows:
        if r["change"]:
            spikes[r["seed"], r["onset"]][r["change"]] = r
    whole = [found for found in spikes.values() if len(found) == len(changes)]
    return [
        {"change": name, "spikes": len(whole)}
        | {m: vars(Mean.of([float(f[name][m]) for f in whole])) for m in _MEASURES}
        | {
            f"{m}_less_noise": vars(Mean.of([_less_noise(f, name, m) for f in whole]))
            for m in _MEASURES
        }
        for name in changes
        if whole
    ]


def _less_noise(found: Mapping[str, Any], name: str, measure: str) -> float:
    """Return the difference from the mean of the noise changes."""
    tiny = [float(found[n][measure]) for n in found if n.startswith(_TINY)]
    return float(found[name][measure]) - sum(tiny) / len(tiny)


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Does a natural spike come back?",
        "",
        f"`tiny`, {result['scenario']}: each spike that the detector raised was run again from "
        "one snapshot",
        f"before it, on the same batches, up to {result['after']} steps behind its onset, with "
        "one change at a time.",
        "`again` is the share in which the detector raises a spike again; peak and excess (nats, "
        "nats · steps) are",
        "above the median loss before the snapshot, `last` is the median of the last ten losses. "
        "Mean over spikes",
        "and 95 % interval (bootstrap).",
        "",
        where(result),
        "",
        "| change | spikes | again | peak | excess | last | excess against noise 1e-6 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        cells = [
            _cell(r["again"], 2),
            _cell(r["peak"], 2),
            _cell(r["excess"], 1),
            _cell(r["last"], 2),
        ]
        lines.append(
            f"| {r['change']} | {r['spikes']} | {' | '.join(cells)} | "
            f"{_cell(r['excess_less_noise'], 1)} |"
        )
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def _cell(m: Mapping[str, Any], digits: int) -> str:
    return f"{m['mean']:.{digits}f} ({m['low']:.{digits}f} – {m['high']:.{digits}f})"
