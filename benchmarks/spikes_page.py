"""The result of `geodiag bench spikes` as a Markdown page."""

from collections.abc import Iterator
from typing import Any

from geodiag.benchmarks.spike_scores import Score

_ABOUT_GROUPS = (
    "A: every-step pre-training with spikes; B: MoE pre-training logged every 5th step, with "
    "spikes; "
    "C: healthy;\n"
    "D: noisy, fine-tuning. Delay: median rows from the breakout. C and D: false alarms in 10,000 "
    "rows.\n"
    "Public rules with their defaults, on the loss alone, written from their definitions."
)
_ABOUT_PLANTED = (
    "Every 600 updates, on the curves of C and D that log each step; σ is that of the 200 updates "
    "before. One log of D was smoothed before logging: a jump that only decays is one bad batch "
    "there."
)


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    lines = [
        "# Spike detectors on real loss curves",
        "",
        _ABOUT_GROUPS,
        "",
        *_table("rule", result["rules"]),
        "",
        f"One update of ours takes {result['microseconds_per_update']:.1f} µs on one CPU core.",
    ]
    if "sensitivity" in result:
        lines += [
            "",
            "## Each option a fifth lower and higher",
            "",
            *_table("option", result["sensitivity"]),
        ]
    if "trials" in result:
        lines += [
            "",
            "## Ours on the same curves made harder",
            "",
            *_table("change", result["trials"]),
        ]
        lines += [
            "",
            "## Events planted on healthy curves",
            "",
            _ABOUT_PLANTED,
            "",
            *_planted(result["planted"]),
        ]
    return "\n".join(lines) + "\n"


def _planted(rows: dict[str, dict]) -> Iterator[str]:
    yield "| planted | C recall | C delay | C false | D recall | D delay | D false |"
    yield "|---|---|---|---|---|---|---|"
    for name, by_group in rows.items():
        cells = []
        for group in (by_group.get(g, Score().summary()) for g in "CD"):
            hit = (
                f"{group['recall']:.2f} | {group['delay']:g}"
                if group["delay"] is not None
                else "– | –"
            )
            cells.append(f"{hit} | {group['false_per_10k']:.1f}")
        yield f"| {name} | {' | '.join(cells)} |"


def _table(first: str, rows: dict[str, dict]) -> Iterator[str]:
    groups = (
        "A recall / precision | A F1 | A delay | B recall / precision | B F1 | C false | D false"
    )
    yield f"| {first} | {groups} |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, by_group in rows.items():
        a, b, c, d = (by_group.get(g, Score().summary()) for g in "ABCD")
        both = [f"{g['recall']:.2f} / {g['precision']:.2f} | {g['f1']:.2f}" for g in (a, b)]
        delay = "–" if a["delay"] is None else f"{a['delay']:g}"
        false = f"{c['false_per_10k']:.1f} | {d['false_per_10k']:.1f}"
        yield f"| {name} | {both[0]} | {delay} | {both[1]} | {false} |"
