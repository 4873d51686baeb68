"""The attribution experiment: faults planted in real trainings, and what the cascade says of each.

    geodiag bench cascade [--seeds 1000-1015] [--residuals mhc hc] [--size tiny] [--clean 10] [--runs DIR] [--workers 2]

Every kind of fault is planted once per seed and residual, its step, layer and magnitude drawn from the seed. What was
trained stays in DIR, so that a bench that was stopped goes on, and a record can be looked at. A fault that neither
raises a spike or a warning nor moves the loss by 4 σ of batch noise over its twin's is excluded: that rule, the stage
each kind breaks first, and the seeds were fixed before anything was measured.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geodiag.benchmarks.cascade_grades import Grade, false_alarms, grade, summary
from geodiag.benchmarks.cascade_trials import CLEAN_STEPS, TRUTHS, Trial, plan, train_all
from geodiag.benchmarks.report import Parser, save, say, setting, where
from geodiag.run import open_run

TARGETS = {"stage_top1": 0.95, "layer_top1": 0.90, "layer_top3": 0.98}
"""What the whole table is to reach."""


def judge(trials: Sequence[Trial], folder: Path) -> dict[str, Any]:
    """Grades what is in the folder."""
    there = [t for t in trials if (folder / t.name).is_dir()]
    graded = [grade(t, folder) for t in there if t.kind is not None and (folder / t.twin).is_dir()]
    clean = [false_alarms(open_run(folder / t.name)) for t in there if t.kind is None]
    total = {k: sum(c[k] for c in clean) for k in ("steps", "spikes", "warnings")}
    return {
        "kinds": {k: summary([g for g in graded if g.trial.kind == k]) for k in TRUTHS},
        "all": summary(graded),
        "clean": {"runs": len(clean)} | total,
        "missing": sorted(t.name for t in trials if t not in there),
        "trials": [_line(g) for g in graded],
    }


def _line(found: Grade) -> dict[str, Any]:
    return found.as_json() | {"truth": asdict(TRUTHS[found.trial.kind or ""])["stage"]}


def page(result: dict[str, Any]) -> str:
    """The result as a page."""
    asked, clean = result["settings"], result["clean"]
    alarms = clean["spikes"] + clean["warnings"]
    rows = [_row(kind, s) for kind, s in result["kinds"].items() if s["trials"]]
    lines = [
        "# What the cascade says of planted faults",
        "",
        f"`{asked['size']}` ({', '.join(asked['residuals'])}), seeds {asked['seeds']}: every kind once per seed, its",
        "step, layer and magnitude drawn from it. Excluded: no spike, no warning, and a loss within 4 σ of its twin's.",
        "Missed: the loss moved, and nothing was said. Shares are of the faults that were seen; lead: steps from the",
        "origin's onset to the loss's; warned: of the spikes, those with a warning before the loss's onset.",
        "",
        "| fault | trials | excluded | missed | spikes | warnings alone | stage top-1 | layer top-1 | top-3 | expert "
        "| lead | warned | warning's lead |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        _row("**all**", result["all"]),
        "",
        f"Clean trainings: {clean['runs']} runs, {clean['steps']} steps, {clean['spikes']} spikes and "
        f"{clean['warnings']} warnings raised: {1e4 * alarms / max(clean['steps'], 1):.2f} in 10,000 steps.",
        "",
        where(result),
        "",
        f"    {result['command']}",
    ]
    if result["missing"]:
        lines += ["", f"**{len(result['missing'])} trials were not trained: {', '.join(result['missing'][:6])} …**"]
    return "\n".join(lines) + "\n"


def _row(name: str, s: dict[str, Any]) -> str:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f} %"

    def steps(value: float | None) -> str:
        return "–" if value is None else f"{value:g}"

    counts = [str(s[k]) for k in ("trials", "excluded", "missed", "spikes", "warnings_alone")]
    shares = [share(s[k]) for k in ("stage_top1", "layer_top1", "layer_top3", "expert_top1")]
    early = [steps(s["lead"]), share(s["warned_before_the_loss"]), steps(s["warning_lead"])]
    return f"| {' | '.join([name, *counts, *shares, *early])} |"


def _range(text: str) -> list[int]:
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(text)
    return list(range(int(match[1]), int(match[2]) + 1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("cascade", __doc__)
    parser.add_argument("--seeds", default="1000-1015", help="FIRST-LAST [%(default)s]")
    parser.add_argument("--residuals", nargs="+", choices=("plain", "hc", "mhc"), default=["mhc", "hc"])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--kinds", nargs="+", choices=list(TRUTHS), default=list(TRUTHS))
    parser.add_argument("--clean", type=int, default=10, help=f"clean trainings of {CLEAN_STEPS} steps [%(default)s]")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time [%(default)s]")
    parser.add_argument("--runs", type=Path, default=Path("runs/cascade"), help="where the trainings are kept")
    parser.add_argument("--grade-only", action="store_true", help="train nothing, grade what is in --runs")
    options = parser.parse_args(argv)
    try:
        seeds = _range(options.seeds)
    except ValueError:
        parser.error(f"--seeds is FIRST-LAST, not {options.seeds!r}")
    trials = plan(seeds, options.residuals, options.size, options.kinds, options.clean)
    if not options.grade_only:
        _train(trials, options)
    names = ("seeds", "residuals", "size", "kinds", "clean", "sequences", "device")
    result = setting("cascade", argv, options.device) | {"settings": {n: getattr(options, n) for n in names}}
    result |= {"targets": TARGETS} | judge(trials, options.runs)
    save("cascade", result, page(result), options.out)
    say(result, page(result), options.json)


def _train(trials: Sequence[Trial], options: Any) -> None:
    from rich.console import Console
    from rich.progress import Progress

    wanted = [t for t in trials if not (options.runs / t.name).is_dir()]
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=len(wanted))
        for name, error in train_all(wanted, options.runs, options.sequences, options.device, options.workers):
            progress.advance(task)
            if error:
                console.print(f"{name}: {error}")


if __name__ == "__main__":
    main()
