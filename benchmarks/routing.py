"""What rolling back and routing by older weights buys: arms that answer spikes, on the same seeds and the same data.

    geodiag bench routing [--seeds 4] [--workers 2] [--minutes 10] [--only WORD …] [--add TRIALS …]

Planted faults are measured against the training of the same seed in which nothing was planted, natural spikes against
the training's own trend. Trials run side by side, seed by seed, until the time is up; each is kept as it ends, and
`--add` joins the trials of earlier sessions. Results: benchmarks/results/routing.json and routing.md.
"""

import gzip
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from geodiag.benchmarks.report import Parser, save, say, setting, where
from geodiag.benchmarks.routing_measures import pooled, summarise
from geodiag.benchmarks.routing_page import page
from geodiag.benchmarks.routing_trial import ARMS, Arm, Scenario

_FAULTY = Scenario(name="", steps=150, residual="hc")
FAULTS = ("lr-shock@75=100", "far-batch@75", "expert-scale@75=30")
PLANTED = [replace(_FAULTY, name=f"{f}, hc, clamp", fault=f) for f in FAULTS]
GRID = [
    replace(_FAULTY, name=f"{FAULTS[2]}, {r}, {'clamp' if c else 'no clamp'}", residual=r, clamp=c, fault=FAULTS[2])
    for r in ("hc", "mhc")
    for c in (10.0, None)
    if (r, c) != ("hc", 10.0)  # that one is among the others
]
NATURAL = Scenario(name="learning rate 0.1, hc, clamp", steps=280, residual="hc", lr=0.1)
NATURAL_GRID = [
    replace(NATURAL, name=f"learning rate 0.1, {r}, {'clamp' if c else 'no clamp'}", residual=r, clamp=c)
    for r in ("hc", "mhc")
    for c in (10.0, None)
    if (r, c) != ("hc", 10.0)
]
DOMAINS = Scenario(name="domains in turn, learning rate 0.03, hc", steps=240, residual="hc", lr=0.03, turn=60)
ANSWERS = ("none", "rollback", "rollback + anticipatory", "rollback + skip-batch", "anticipatory", "router-lag")
ALWAYS = (
    "none",
    "rollback",
    "rollback + anticipatory",
    "rollback + lower-lr",
    "always anticipatory",
    "always router-lag",
)
DELAYS = ("always anticipatory, Δ = 1", "always anticipatory, Δ = 32")
Plan = list[tuple[Scenario, tuple[str, ...]]]
MAIN: Plan = [
    (NATURAL, ALWAYS),
    (PLANTED[0].twin, ("none", "always anticipatory", "always router-lag")),
    *((s, ANSWERS) for s in PLANTED),
    (DOMAINS, ("none", "rollback + anticipatory", "always anticipatory")),
]
"""Scenario → its arms; the healthy twins of planted faults are trained too."""
MORE: Plan = [
    (NATURAL, DELAYS),
    *((s, ("none", "always anticipatory")) for s in NATURAL_GRID),
    *((s, ("none", "rollback + anticipatory")) for s in GRID),
]
"""Other delays, and the clamp with each kind of residual: after every three seeds of `MAIN`, for those seeds."""

_TOGETHER = 3
Job = tuple[Scenario, Arm, int, str]


def jobs(seeds: Sequence[int], device: str, only: Sequence[str] = ()) -> Iterator[Job]:
    """Seed by seed, so that whenever the time is up every scenario has about as many."""
    for first in range(0, len(seeds), _TOGETHER):
        some = seeds[first : first + _TOGETHER]
        for plan in (MAIN, MORE):
            chosen = [(s, arms) for s, arms in plan if not only or any(word in s.name for word in only)]
            pairs = [(s, arm) for s, arms in chosen for arm in arms]
            pairs = list(dict.fromkeys([*((s.twin, "none") for s, _ in chosen if s.fault), *pairs]))
            yield from ((scenario, ARMS[arm], seed, device) for seed in some for scenario, arm in pairs)


def work(job: Job) -> dict[str, Any]:
    """One trial, in a process of its own."""
    import torch

    from geodiag.benchmarks.routing_trial import train

    torch.set_num_threads(1)
    scenario, arm, seed, device = job
    began = time.perf_counter()
    try:
        found = train(scenario, arm, seed, device)
        return found | {"seconds": time.perf_counter() - began, "place": where(setting("routing", [], device))}
    except Exception as e:  # one trial that fails is told, and the others go on
        return {"failed": f"{scenario.name}, {arm.name}, seed {seed}: {type(e).__name__}: {e}"}


def run(
    seeds: Sequence[int], workers: int, minutes: float, out: Path, device: str = "cpu", only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Trains until the time is up; every trial is a line of `trials.jsonl` as soon as it ends."""
    out.mkdir(parents=True, exist_ok=True)
    ends, found = time.monotonic() + 60 * minutes, []
    with multiprocessing.get_context("spawn").Pool(workers) as pool, (out / "trials.jsonl").open("a") as kept:
        results = pool.imap_unordered(work, jobs(seeds, device, only))
        while (left := ends - time.monotonic()) > 0:
            try:
                trial = results.next(timeout=left)
            except (StopIteration, multiprocessing.TimeoutError):
                break
            if "failed" in trial:
                print(trial["failed"], flush=True)
                continue
            found.append(trial)
            kept.write(json.dumps(trial) + "\n")
            kept.flush()
        pool.terminate()
    return found


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Trials of earlier sessions; of one that was cut off in the middle of a line, all but that line."""
    found = []
    for path in paths:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for line in data.decode().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def order(trial: dict[str, Any]) -> tuple[int, int, int]:
    """As in the plan; what is not in it any more comes last."""
    scenarios = [s.name for s, _ in (*MAIN, *MORE)]
    name, arm = trial["scenario"]["name"], trial["arm"]["name"]
    return scenarios.index(name) if name in scenarios else len(scenarios), list(ARMS).index(arm), trial["seed"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("routing", __doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="*", default=[], help="scenarios whose name has one of these words")
    parser.add_argument(
        "--add", type=Path, nargs="*", default=[], help="trials of earlier sessions, .jsonl or .jsonl.gz"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    result: dict[str, Any] = setting("routing", argv, options.device)
    trials = read(options.add)
    if options.seeds:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        trials += run(seeds, options.workers, options.minutes, options.out, options.device, options.only)
    trials.sort(key=order)
    result["trials"], result["places"] = len(trials), sorted({t["place"] for t in trials})
    result["steps"] = sum(len(t["steps"]) for t in trials)
    result["rows"], result["pooled"] = summarise(trials), pooled(trials)
    save("routing", result, page(result), options.out)
    say(result, page(result), options.json)


if __name__ == "__main__":
    main()
