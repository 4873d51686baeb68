"""Benchmark of rollback and of routing by older weights: arms against spikes, same seeds and data.

    geodiag bench routing [--seeds 4] [--workers 2] [--minutes 10] [--only WORD …] [--add TRIALS …]
    geodiag bench routing --size small --device cuda --pilot   # which scenarios spike at all?
    geodiag bench routing --size small --device cuda --lr 0.05 --workers 12 --minutes 7

Planted faults are measured against the training of the same seed without the fault, natural spikes
against the training's own trend. Trials run in parallel, on all visible GPUs if there are any, seed
by seed. An arm runs only for seeds whose training without intervention spiked. After the time is up
only arms of seeds with a spike start, and running trials end. Each trial is saved when it ends;
`--add` reads the trials of earlier sessions. Results: routing.json (pooled differences) and
routing.md (every scenario) in benchmarks/results, and all trials in routing_trials.jsonl.gz, which
is large and not in git.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geodiag.benchmarks.report import Parser, present, save, say, setting
from geodiag.benchmarks.routing_measures import pooled, summarise
from geodiag.benchmarks.routing_page import page
from geodiag.benchmarks.routing_plan import SMALL_LR, jobs, pilot, plans
from geodiag.benchmarks.routing_trial import ARMS
from geodiag.benchmarks.routing_workers import run
from geodiag.hooks.control.controller import TROUBLE


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the trials of earlier sessions, without a last line that was cut off."""
    found = []
    for path in paths:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for line in data.decode().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def order(trial: dict[str, Any]) -> tuple[bool, int, str, int, int]:
    """Return the sort key of a trial: larger models first, then the order of the plan."""
    scenarios = [s.name for plan in plans("tiny") for s, _ in plan]
    name = trial["scenario"]["name"]
    arm = trial["arm"]["name"]
    place = scenarios.index(name) if name in scenarios else len(scenarios)
    return trial["scenario"]["size"] == "tiny", place, name, list(ARMS).index(arm), trial["seed"]


def summary(trial: dict[str, Any]) -> str:
    """Return the line of a pilot training: its spikes, losses and time per step."""
    raised = [f"{e['kind']} at {e['step']}" for e in trial["events"] if e["kind"] in TROUBLE]
    losses = [x for x in trial["losses"] if x is not None]
    spikes = ", ".join(raised) or "no spike"
    highest = max(losses[20:], default=float("nan"))
    milliseconds = 1e3 * trial["seconds"] / len(trial["steps"])
    return (
        f"{trial['scenario']['name']}: {spikes}; loss {losses[-1]:.2f}, "
        f"highest after step 20 {highest:.2f}; {milliseconds:.0f} ms a step"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("routing", __doc__)
    parser.add_argument(
        "--size", choices=["tiny", "small"], default="tiny", help="of the model [%(default)s]"
    )
    parser.add_argument(
        "--lr", type=float, nargs="*", default=[SMALL_LR], help="at which small is driven"
    )
    parser.add_argument("--arms", nargs="*", default=[], help="only these, with no intervention")
    parser.add_argument(
        "--pilot",
        action="store_true",
        help="train each scenario of small once, and say which spike",
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--only", nargs="*", default=[], help="scenarios whose name has one of these words"
    )
    parser.add_argument(
        "--add",
        type=Path,
        nargs="*",
        default=[],
        help="trials of earlier sessions, .jsonl or .jsonl.gz",
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    present(options.device)
    if options.pilot:
        trials = run(
            pilot(), options.workers, options.minutes, options.out / "pilot", options.device
        )
        print("\n".join(summary(t) for t in sorted(trials, key=lambda t: t["scenario"]["name"])))
        return
    result: dict[str, Any] = setting("routing", argv, options.device)
    trials = read(options.add)
    if options.seeds:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        planned = jobs(
            plans(options.size, options.lr),
            seeds,
            options.only,
            together=4 if options.size == "small" else 3,
        )
        if options.arms:
            unknown = set(options.arms) - ARMS.keys()
            if unknown:
                parser.error(f"no arm is called {unknown.pop()!r}; there are {', '.join(ARMS)}")
            planned = (job for job in planned if job[1].name in ("none", *options.arms))
        trials += run(planned, options.workers, options.minutes, options.out, options.device)
    trials.sort(key=order)
    result["trials"] = sum(not t.get("same") for t in trials)
    result["places"] = sorted({t["place"] for t in trials})
    result["steps"] = sum(len(t["steps"]) for t in trials if not t.get("same"))
    result["rows"] = summarise(trials)
    result["pooled"] = pooled(trials)
    kept = {name: value for name, value in result.items() if name != "rows"}
    save("routing", kept, page(result), options.out)
    (options.out / "routing_trials.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(t) + "\n" for t in trials).encode(), mtime=0)
    )
    say(result, page(result), options.json)


if __name__ == "__main__":
    main()
