"""The routing bench's result as a page: one table a scenario."""

from typing import Any

_SHOWN = {
    "peak": ("peak", 2),
    "excess": ("excess", 1),
    "recovery_steps": ("recovery", 0),
    "steps_lost": ("lost", 0),
    "final_loss": ("final", 3),
    "spikes_per_10k": ("spikes / 10 k", 0),
}
_POOLED = ("peak", "excess", "steps_lost", "final_loss", "spikes_per_10k")


def page(result: dict[str, Any]) -> str:
    lines = [
        "# What rolling back and routing by older weights buys",
        "",
        f"{result['trials']} trainings, {result['steps']} steps. Mean over seeds and its 95 % interval (bootstrap).",
        "Planted faults: peak, excess (area, nats · steps) and final loss against the training of the same seed with",
        "nothing planted. Otherwise: above the training's own trend, and the final loss itself. Every executed step",
        "counts, the ones that were rolled back too; `lost` are steps executed more than once.",
        "",
        *result["places"],
        "",
    ]
    lines += [
        "## All that spike by themselves, against no intervention",
        "",
        "Differences, paired by scenario and seed; below 0 is better.",
        "",
        f"| arm | pairs | {' | '.join(_SHOWN[n][0] for n in _POOLED)} |",
        "|---|---|" + "---|" * len(_POOLED),
        *(
            f"| {r['arm']} | {r['peak']['n']} | {' | '.join(_cell(r[n], _SHOWN[n][1]) for n in _POOLED)} |"
            for r in result["pooled"]
        ),
        "",
    ]
    for scenario in dict.fromkeys(r["scenario"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["scenario"] == scenario]
        shown = {n: v for n, v in _SHOWN.items() if n in rows[0]["measures"]}
        lines += [
            f"## {scenario}",
            "",
            f"| arm | seeds | {' | '.join(title for title, _ in shown.values())} | flips at Δ |",
            "|---|---|" + "---|" * (len(shown) + 1),
            *(_row(r, shown) for r in rows),
            "",
        ]
    return "\n".join([*lines, f"    {result['command']}", ""])


def _row(row: dict[str, Any], shown: dict[str, tuple[str, int]]) -> str:
    cells = [_cell(row["measures"][n], digits) for n, (_, digits) in shown.items()]
    flips = row["measures"]["flips_anticipatory"]
    if not flips["n"]:
        flips = row["measures"]["flips_router"]
    return f"| {row['arm']} | {len(row['seeds'])} | {' | '.join(cells)} | {_cell(flips, 3)} |"


def _cell(m: dict[str, Any], digits: int) -> str:
    if not m["n"]:
        return "–"
    return f"{m['mean']:.{digits}f} ({m['low']:.{digits}f} – {m['high']:.{digits}f})"
