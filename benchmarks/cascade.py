"""Benchmark of attribution: plant faults in real trainings and grade their explanations.

    geodiag bench cascade [--seeds 1000-1015] [--residuals mhc hc] [--size tiny] [--clean 12]
    [--runs DIR] [--workers 2]

Every kind of fault is planted once per seed and residual; its step, layer and magnitude are drawn
from the seed. Trained runs stay in DIR, so that a stopped benchmark continues and runs can be
examined. Each trial is graded after its training, one line of `cascade.jsonl` in --out; --add reads
such lines from other folders. A fault is excluded if it raises no spike and no warning and moves
the loss by less than 4 σ of batch noise from its twin. This rule, the stage that each kind breaks
first, and the seeds were fixed before the first measurement.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geodiag.benchmarks.cascade_table import judged, page
from geodiag.benchmarks.cascade_trials import CLEAN_STEPS, TRUTHS, Trial, plan
from geodiag.benchmarks.cascade_workers import Work, lines_of
from geodiag.benchmarks.report import Parser, save, say, setting
from geodiag.benchmarks.routing import read


def _range(text: str) -> list[int]:
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(text)
    return list(range(int(match[1]), int(match[2]) + 1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("cascade", __doc__)
    parser.add_argument("--seeds", default="1000-1015", help="FIRST-LAST [%(default)s]")
    parser.add_argument(
        "--residuals", nargs="+", choices=("plain", "hc", "mhc"), default=["mhc", "hc"]
    )
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--kinds", nargs="+", choices=list(TRUTHS), default=list(TRUTHS))
    parser.add_argument(
        "--clean",
        type=int,
        default=12,
        help=f"clean trainings of {CLEAN_STEPS} steps [%(default)s]",
    )
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time [%(default)s]")
    parser.add_argument(
        "--minutes", type=float, default=600.0, help="0 trains nothing [%(default)s]"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/cascade"), help="where the trainings are kept"
    )
    parser.add_argument(
        "--grade-only", action="store_true", help="train nothing, grade what is in --runs"
    )
    parser.add_argument(
        "--add", type=Path, nargs="*", default=[], help="lines from elsewhere, .jsonl or .jsonl.gz"
    )
    options = parser.parse_args(argv)
    try:
        seeds = _range(options.seeds)
    except ValueError:
        parser.error(f"--seeds is FIRST-LAST, not {options.seeds!r}")
    names = ("seeds", "residuals", "size", "kinds", "clean", "sequences", "device")
    result = setting("cascade", argv, options.device) | {
        "settings": {n: getattr(options, n) for n in names}
    }
    trials = plan(seeds, options.residuals, options.size, options.kinds, options.clean)
    lines = {line["name"]: line for line in [*read(options.add), *_graded(trials, options)]}
    result["missing"] = [t.name for t in trials if t.name not in lines]
    result |= judged(sorted(lines.values(), key=lambda line: line["name"]))
    save("cascade", result, page(result), options.out)
    say(result, page(result), options.json)


def _graded(trials: Sequence[Trial], options: Any) -> list[dict[str, Any]]:
    """Return the lines of all trials that were trained in time; report failed trials."""
    from rich.console import Console
    from rich.progress import Progress

    if options.minutes <= 0:
        return []
    work = Work(options.runs, options.sequences, options.device)
    if options.grade_only:
        trials = [t for t in trials if (options.runs / t.name).is_dir()]
    lines = []
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("trials", total=len(trials))
        for line in lines_of(
            trials, work, options.workers, options.minutes, options.out / "cascade.jsonl"
        ):
            progress.advance(task)
            if "failed" in line:
                console.print(f"{line['name']}: {line['failed']}")
            else:
                lines.append(line)
    return lines


if __name__ == "__main__":
    main()
