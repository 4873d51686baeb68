"""The table of `geodiag bench cascade`: summaries of graded trials, and the Markdown page."""

import statistics
from collections.abc import Sequence
from typing import Any

from geodiag.benchmarks.cascade_trials import TRUTHS

Line = dict[str, Any]
TARGETS = {
    "stage_top1": 0.95,
    "layer_top1": 0.90,
    "layer_top3": 0.98,
    "warned": 0.70,
    "warning_lead": 5,
}
"""What the whole table is to reach; the last two of the spikes of faults that grow."""


def judged(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the summary of all trials, of each kind of fault, and of the false alarms."""
    faults = [ln for ln in lines if ln["kind"] is not None]
    growing = [ln for ln in faults if ln["kind"].startswith("growing ")]
    clean = [ln for ln in lines if ln["kind"] is None]
    return {
        "targets": TARGETS,
        "kinds": {k: summary([ln for ln in faults if ln["kind"] == k]) for k in TRUTHS},
        "growing": summary(growing),
        "all": summary(faults),
        "clean": {"runs": len(clean)} | _total(clean),
        "before": {"runs": len(faults)} | _total([ln["before"] for ln in faults]),
        "places": sorted({ln["place"] for ln in lines}),
        "trials": len(lines),
    }


def _total(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {k: sum(c[k] for c in counts) for k in ("steps", "spikes", "warnings")}


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Return how many trials count, how many are attributed correctly, and how early."""
    counted = [ln for ln in lines if not ln["excluded"]]
    read = [ln for ln in counted if ln["seen"]]
    layered = [ln for ln in read if ln["layer"] is not None]
    spiked = [ln for ln in counted if ln["spike_onset"] is not None]
    early = [ln["warning_lead"] for ln in spiked if (ln["warning_lead"] or 0) > 0]
    return {
        "trials": len(lines),
        "excluded": len(lines) - len(counted),
        "missed": len(counted) - len(read),
        "spikes": len(spiked),
        "nonfinite": sum(ln["spike_kind"] == "nonfinite" for ln in spiked),
        "warnings_alone": len(read) - len(spiked),
        "stage_top1": _share([ln["stage_right"] for ln in read]),
        "layer_top1": _share([ln["layer_right"] for ln in layered]),
        "layer_top3": _share([ln["layer_in_3"] for ln in layered]),
        "expert_top1": _share(
            [ln["expert_right"] for ln in layered if ln["expert_right"] is not None]
        ),
        "lead": _median([ln["lead"] for ln in read if ln["lead"] is not None]),
        "warned": len(early) / len(spiked) if spiked else None,
        "warning_lead": _median(early),
    }


def _share(held: Sequence[bool]) -> float | None:
    return sum(held) / len(held) if held else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


# -- the page --------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    asked = result["settings"]
    rows = [_row(kind, s) for kind, s in result["kinds"].items() if s["trials"]]
    lines = [
        "# What the cascade says of planted faults",
        "",
        f"`{asked['size']}` ({', '.join(asked['residuals'])}), seeds {asked['seeds']}: every "
        "kind once per seed, its",
        "step, layer and magnitude drawn from it. What grows is planted again at every step to "
        "the end, on top of",
        "itself, by a factor chosen on other seeds so that the loss spikes where it can. "
        "Excluded: no spike, no",
        "warning, and a loss within 4 σ of its twin's. Missed: the loss moved, and nothing was "
        "said. Spikes: in",
        "brackets those that were a loss of no finite number. Shares are of the faults that were "
        "seen; lead: steps",
        "from the origin's onset to the loss's; warned: of the spikes, those with a warning "
        "before the loss's onset.",
        "",
        "| fault | trials | excluded | missed | spikes | warnings alone | stage top-1 | layer "
        "top-1 | top-3 | expert "
        "| lead | warned | warning's lead |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        _row("**growing**", result["growing"]),
        _row("**all**", result["all"]),
        "",
        f"Trainings without a fault: {_alarms(result['clean'])}",
        "Before a fault, in trainings that share their seeds with others: "
        f"{_alarms(result['before'])}",
        "",
        *result["places"],
        "",
        f"    {result['command']}",
    ]
    if result["missing"]:
        lines += [
            "",
            f"**{len(result['missing'])} trials were not trained: "
            f"{', '.join(result['missing'][:6])} …**",
        ]
    return "\n".join(lines) + "\n"


def _alarms(c: dict[str, int]) -> str:
    rate = 1e4 * (c["spikes"] + c["warnings"]) / max(c["steps"], 1)
    raised = f"{c['spikes']} spikes and {c['warnings']} warnings raised"
    return f"{c['runs']} runs, {c['steps']} steps, {raised}: {rate:.2f} in 10,000 steps."


def _row(name: str, s: dict[str, Any]) -> str:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f} %"

    def steps(value: float | None) -> str:
        return "–" if value is None else f"{value:g}"

    counts = [str(s[k]) for k in ("trials", "excluded", "missed", "spikes", "warnings_alone")]
    counts[3] += f" ({s['nonfinite']})" if s["nonfinite"] else ""
    shares = [share(s[k]) for k in ("stage_top1", "layer_top1", "layer_top3", "expert_top1")]
    early = [steps(s["lead"]), share(s["warned"]), steps(s["warning_lead"])]
    return f"| {' | '.join([name, *counts, *shares, *early])} |"
