"""The result of `geodiag bench routing` as a Markdown page: one table per scenario."""

from typing import Any

from geodiag.benchmarks.routing_measures import AFTER

_SHOWN = {
    "peak": ("peak", 2),
    "excess": ("excess", 1),
    "recovery_steps": ("recovery", 0),
    "steps_lost": ("lost", 0),
    "final_loss": ("final", 3),
    "spikes_per_10k": ("spikes / 10 k", 0),
    "again": ("again", 2),
    "steps_before": ("before", 0),
}
_POOLED = (
    "peak",
    "excess",
    "recovery_steps",
    "steps_lost",
    "final_loss",
    "spikes_per_10k",
    "again",
)


_MEANINGS = [
    "- peak, excess (area, nats · steps), recovery (steps) and final loss: with a planted fault "
    "against the training of the",
    "  same seed with nothing planted; otherwise above the training's own trend, and the final "
    "loss itself. Every executed",
    "  step counts, the ones that were rolled back too.",
    "- lost: steps executed more than once.",
    "- again: of trainings that went back, the share whose first spike was raised again within "
    f"{AFTER} steps of its onset.",
    "- before: steps from where they went back to first, to that onset, in which a change could "
    "grow. Routing asks for at",
    "  least Δ, and so does the noise that it is compared with.",
    "- flips at Δ: on the probe batch; in earlier trials of `tiny`, of cached against live choices "
    "where routing was on,",
    "  else of the router's own update alone.",
    "",
]
"""Lines of the page that explain its columns."""


def page(result: dict[str, Any]) -> str:
    lines = [
        "# What rolling back and routing by older weights buys",
        "",
        f"{result['trials']} trainings, {result['steps']} steps. Mean over seeds and its 95 % "
        "interval (bootstrap).",
        "",
        *_MEANINGS,
        *result["places"],
        "",
    ]
    for size in dict.fromkeys(r["size"] for r in result["pooled"]):
        rows = [r for r in result["pooled"] if r["size"] == size]
        lines += [
            f"## `{size}`: all that spike by themselves, against no intervention",
            "",
            "Differences, paired by scenario and seed; below 0 is better. `again` is no "
            "difference. Where no spike was",
            "raised, an answer is the training without one, bit for bit, and counts as a pair "
            "that differs by 0.",
            "",
            f"| arm | pairs, with a spike | {' | '.join(_SHOWN[n][0] for n in _POOLED)} |",
            "|---|---|" + "---|" * len(_POOLED),
            *(
                f"| {r['arm']} | {r['peak']['n']}, {r['spiked']} | "
                f"{' | '.join(_cell(r[n], _SHOWN[n][1]) for n in _POOLED)} |"
                for r in rows
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
    known = (row["measures"][n] for n in ("flips", "flips_anticipatory", "flips_router"))
    flips = next((m for m in known if m["n"]), row["measures"]["flips"])
    return f"| {row['arm']} | {len(row['seeds'])} | {' | '.join(cells)} | {_cell(flips, 3)} |"


def _cell(m: dict[str, Any], digits: int) -> str:
    if not m["n"]:
        return "–"
    return f"{m['mean']:.{digits}f} ({m['low']:.{digits}f} – {m['high']:.{digits}f})"
