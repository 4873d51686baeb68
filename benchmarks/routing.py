"""What rolling back and routing by older weights buys: arms that answer spikes, on the same seeds and the same data.

    geodiag bench routing [--seeds 4] [--workers 2] [--minutes 10] [--only WORD …] [--add TRIALS …]
    geodiag bench routing --size small --device cuda --pilot             # which scenarios spike at all?
    geodiag bench routing --size small --device cuda --lr 0.05 --workers 12 --minutes 7

Planted faults are measured against the training of the same seed in which nothing was planted, natural spikes against
the training's own trend. Trials run side by side, on all GPUs that are seen where there are any, seed by seed; those
that answer a spike only where there was one to answer. Once the time is up none begins any more, and those under way
end. Each is kept as it ends, and `--add` joins the trials of earlier sessions. Results: routing.json and routing.md in
benchmarks/results, and all trials in routing_trials.jsonl.gz.
"""

import gzip
import json
import multiprocessing
import os
import queue
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geodiag.benchmarks.report import Parser, present, save, say, setting, where
from geodiag.benchmarks.routing_measures import pooled, summarise
from geodiag.benchmarks.routing_page import page
from geodiag.benchmarks.routing_plan import SMALL_LR, Job, jobs, pilot, plans
from geodiag.benchmarks.routing_trial import ARMS

RAISED = ("spike", "divergence", "nonfinite")
"""Events that are answered."""
_GRACE = 180.0
"""Seconds that the trials under way have when the time is up."""


def settle(gpus: Sequence[str], number: Any) -> None:
    """In each new worker: one of the GPUs is all that it sees, and torch may be asked for the same bits every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with number:
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number.value % len(gpus)]
        number.value += 1


def visible() -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def work(task: tuple[Job, str]) -> dict[str, Any]:
    """One trial, in a process of its own."""
    import torch

    from geodiag.benchmarks.routing_trial import train

    (scenario, arm, seed), device = task
    began = time.monotonic()
    torch.set_num_threads(1)
    try:
        found = train(scenario, arm, seed, device)
        seconds = time.monotonic() - began
        return found | {"seconds": seconds, "place": where(setting("routing", [], device))}
    except Exception as e:  # one trial that fails is told, and the others go on
        return {"failed": f"{scenario.name}, {arm.name}, seed {seed}: {type(e).__name__}: {e}"}


class Plan:
    """What is trained next. An arm that answers spikes waits for the training of its seed without intervention: where
    that raised none, they are the same training, bit for bit, and it is not trained again."""

    def __init__(self, planned: Iterable[Job], device: str) -> None:
        jobs = list(planned)
        plain = {(s.name, seed) for s, arm, seed in jobs if arm.name == "none"}
        self._next: deque[Job] = deque()
        self._waiting: dict[tuple[str, int], list[Job]] = defaultdict(list)
        for job in jobs:
            scenario, arm, seed = job
            repeats = device == "cpu" or scenario.deterministic
            waits = repeats and arm.mode == "auto" and (scenario.name, seed) in plain
            (self._waiting[scenario.name, seed] if waits else self._next).append(job)

    def next(self) -> Job | None:
        return self._next.popleft() if self._next else None

    def ended(self, trial: dict[str, Any]) -> list[dict[str, Any]]:
        """The trials that are known now: this one, and those that are the same."""
        if trial["arm"]["name"] != "none":
            return [trial]
        waited = self._waiting.pop((trial["scenario"]["name"], trial["seed"]), [])
        if any(e["kind"] in RAISED for e in trial["events"]):
            self._next.extendleft(reversed(waited))
            return [trial]
        return [trial, *(trial | {"arm": asdict(arm), "same": True} for _, arm, _ in waited)]


def run(planned: Iterable[Job], workers: int, minutes: float, out: Path, device: str = "cpu") -> list[dict[str, Any]]:
    """Trains until the time is up; every trial is a line of `trials.jsonl` as soon as it ends."""
    out.mkdir(parents=True, exist_ok=True)
    ends, found = time.monotonic() + 60 * minutes, []
    plan, results, under_way = Plan(planned, device), queue.SimpleQueue[Any](), 0
    context = multiprocessing.get_context("spawn")
    start = (visible() if device == "cuda" else [], context.Value("i", 0))
    with context.Pool(workers, settle, start) as pool, (out / "trials.jsonl").open("a") as kept:
        while True:
            while under_way < workers and time.monotonic() < ends and (job := plan.next()):
                pool.apply_async(work, ((job, device),), callback=results.put, error_callback=results.put)
                under_way += 1
            if not under_way:
                break
            try:
                trial = results.get(timeout=max(ends + _GRACE - time.monotonic(), 0.01))
            except queue.Empty:
                break
            under_way -= 1
            if isinstance(trial, BaseException) or "failed" in trial:
                print(trial if isinstance(trial, BaseException) else trial["failed"], flush=True)
                continue
            for known in plan.ended(trial):
                found.append(known)
                kept.write(json.dumps(known) + "\n")
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


def order(trial: dict[str, Any]) -> tuple[bool, int, str, int, int]:
    """Larger models first, then as in the plan; what is not in it any more comes last."""
    scenarios = [s.name for plan in plans("tiny") for s, _ in plan]
    name, arm = trial["scenario"]["name"], trial["arm"]["name"]
    place = scenarios.index(name) if name in scenarios else len(scenarios)
    return trial["scenario"]["size"] == "tiny", place, name, list(ARMS).index(arm), trial["seed"]


def summary(trial: dict[str, Any]) -> str:
    """A pilot's line: did it spike, and what did a step take?"""
    raised = [f"{e['kind']} at {e['step']}" for e in trial["events"] if e["kind"] in RAISED]
    losses = [x for x in trial["losses"] if x is not None]
    said = ", ".join(raised) or "no spike"
    end = f"loss {losses[-1]:.2f}, highest behind step 20 {max(losses[20:], default=float('nan')):.2f}"
    return f"{trial['scenario']['name']}: {said}; {end}; {1e3 * trial['seconds'] / len(trial['steps']):.0f} ms a step"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("routing", __doc__)
    parser.add_argument("--size", choices=["tiny", "small"], default="tiny", help="of the model [%(default)s]")
    parser.add_argument("--lr", type=float, nargs="*", default=[SMALL_LR], help="at which small is driven")
    parser.add_argument("--arms", nargs="*", default=[], help="only these, with no intervention")
    parser.add_argument("--pilot", action="store_true", help="train each scenario of small once, and say which spike")
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
    present(options.device)
    if options.pilot:
        trials = run(pilot(), options.workers, options.minutes, options.out / "pilot", options.device)
        print("\n".join(summary(t) for t in sorted(trials, key=lambda t: t["scenario"]["name"])))
        return
    result: dict[str, Any] = setting("routing", argv, options.device)
    trials = read(options.add)
    if options.seeds:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        planned = jobs(
            plans(options.size, options.lr), seeds, options.only, together=4 if options.size == "small" else 3
        )
        if options.arms:
            unknown = set(options.arms) - ARMS.keys()
            if unknown:
                parser.error(f"no arm is called {unknown.pop()!r}; there are {', '.join(ARMS)}")
            planned = (job for job in planned if job[1].name in ("none", *options.arms))
        trials += run(planned, options.workers, options.minutes, options.out, options.device)
    trials.sort(key=order)
    result["trials"], result["places"] = len(trials), sorted({t["place"] for t in trials})
    result["steps"] = sum(len(t["steps"]) for t in trials if not t.get("same"))
    result["rows"], result["pooled"] = summarise(trials), pooled(trials)
    save("routing", result, page(result), options.out)
    (options.out / "routing_trials.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(t) + "\n" for t in trials).encode(), mtime=0)
    )
    say(result, page(result), options.json)


if __name__ == "__main__":
    main()
