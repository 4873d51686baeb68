"""Benchmark of replays: repeat natural spikes from one snapshot, with one change at a time.

    geodiag bench routing_replay [--seeds 6] [--workers 2] [--minutes 20]

A training at an aggressive learning rate runs until the detector raises a spike. Then every change
starts from the same snapshot, early enough for routing to be on before the onset. `exact replay` is
the control: it has to repeat the spike. `noise` measures the effect of any change at all: an arm
that is no better than weights changed in their sixth digit has no effect.
"""

import copy
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from geodiag.benchmarks.report import Parser, save, say, setting
from geodiag.benchmarks.routing import read
from geodiag.benchmarks.routing_measures import CAP
from geodiag.benchmarks.routing_plan import NATURAL
from geodiag.benchmarks.routing_replay_page import page, summarise
from geodiag.benchmarks.routing_trial import DELAY, Scenario, perturb, setup
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.routing.router_lag import RouterLag
from geodiag.reference_models.data import Batch, Loader
from geodiag.reference_models.train import Trainer
from geodiag.spikes.detector import Spike, SpikeDetector

EVERY = 10
AFTER = 40
"""Steps behind the onset in which a spike is the same one again."""
Change = Callable[[Trainer, Iterator[Batch]], Iterator[Batch]]


class Moment:
    """State of a training before a step."""

    def __init__(self, step: int, trainer: Trainer, detector: SpikeDetector, level: float) -> None:
        self.step = step
        self.level = level
        self._trainer = copy.deepcopy(trainer.state_dict())
        self._detector = copy.deepcopy(detector.state_dict())

    def restore(self, trainer: Trainer) -> SpikeDetector:
        trainer.load_state_dict(copy.deepcopy(self._trainer))
        trainer.lr_scale = 1.0
        detector = SpikeDetector()
        detector.load_state_dict(copy.deepcopy(self._detector))
        return detector


def routed(make: Callable[[Trainer], Rerouting]) -> Change:
    def batches(trainer: Trainer, data: Iterator[Batch]) -> Iterator[Batch]:
        routing = make(trainer)
        routing.enable()
        try:
            yield from routing.batches(data)
        finally:
            routing.remove()

    return batches


def ahead(delay: int) -> Change:
    return routed(
        lambda t: AnticipatoryRouting(t.model, delay, forward=lambda m, b: m(b.token_ids_BS))
    )


def noise(size: float, draw: int) -> Change:
    """Change the weights in a digit without significance."""

    def batches(trainer: Trainer, data: Iterator[Batch]) -> Iterator[Batch]:
        perturb(trainer.model, size, draw)
        return data

    return batches


def lowered(trainer: Trainer, data: Iterator[Batch]) -> Iterator[Batch]:
    trainer.lr_scale = 0.5
    return data


def same(_trainer: Trainer, data: Iterator[Batch]) -> Iterator[Batch]:
    return data


CHANGES: dict[str, Change] = {
    "exact replay": same,
    "noise 1e-6, draw 1": noise(1e-6, 1),
    f"anticipatory, Δ = {DELAY}": ahead(DELAY),
    f"router-lag, Δ = {DELAY}": routed(lambda t: RouterLag(t.model, DELAY)),
    "lower-lr 0.5": lowered,
    "skip-batch": same,
    "noise 1e-6, draw 2": noise(1e-6, 2),
}
"""Change → what is done to the training and its batches; `skip-batch` leaves out those from the
onset to detection.
"""


def study(seed: int, scenario: Scenario, tell: Callable[[dict[str, Any]], None]) -> None:
    """One training; every spike of it is replayed with every change before the training goes on."""
    trainer, loader = setup(scenario, seed)
    detector = SpikeDetector()
    kept = list[Moment]()
    recent = list[float]()
    step = 0
    resting = 0
    while step < scenario.steps:
        if step % EVERY == 0:
            kept = [*kept, Moment(step, trainer, detector, _median(recent[-20:]))][-8:]
        loss = _step(trainer, loader.batch(step))
        recent.append(loss)
        raised = detector.update(step, loss).raised
        if raised and raised.kind == "spike" and step >= resting:
            early = [m for m in kept if m.step <= raised.onset - DELAY - 1]
            if early:
                here = Moment(step + 1, trainer, detector, 0.0)
                for name in CHANGES:
                    tell({"seed": seed, **replay(name, early[-1], raised, trainer, loader)})
                detector = here.restore(trainer)
                resting = step + AFTER
        step += 1
    tell({"seed": seed, "change": None, "steps": scenario.steps, "losses": recent})


def replay(
    name: str, moment: Moment, spike: Spike, trainer: Trainer, loader: Loader
) -> dict[str, Any]:
    """The steps from `moment` to behind the spike again, with one change."""
    detector = moment.restore(trainer)
    last = spike.onset + AFTER
    left_out = range(spike.onset - 1, spike.detected + 1) if name == "skip-batch" else range(0)
    steps = [s for s in range(moment.step, last + 2 * DELAY + 32) if s not in left_out]
    data = CHANGES[name](trainer, (loader.batch(s) for s in steps))
    losses = []
    spikes = []
    for step, batch in islice(enumerate(data, moment.step), last - moment.step):
        losses.append(_step(trainer, batch))
        raised = detector.update(step, losses[-1]).raised
        if raised and raised.kind in ("spike", "divergence", "nonfinite"):
            spikes.append([raised.kind, raised.onset])
    close = getattr(data, "close", None)
    if close:
        close()
    before = moment.level
    return {
        "change": name,
        "from": moment.step,
        "onset": spike.onset,
        "score": spike.score,
        "again": bool(spikes),
        "spikes": spikes,
        "peak": max(losses) - before,
        "excess": sum(max(x - before, 0) for x in losses),
        "last": _median(losses[-10:]),
        "losses": [round(x, 4) for x in losses],
    }


def _step(trainer: Trainer, batch: Batch) -> float:
    loss = float(trainer.step(batch).loss)
    return min(loss, CAP) if loss == loss else CAP


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")


def work(job: tuple[int, Scenario, str]) -> int:
    """Study one seed in a process of its own; write each replay as a line when it ends."""
    torch.set_num_threads(1)
    seed, scenario, path = job

    def tell(row: dict[str, Any]) -> None:
        with open(path, "a") as kept:
            kept.write(json.dumps(row) + "\n")

    study(seed, scenario, tell)
    return seed


def run(seeds: Sequence[int], workers: int, minutes: float, out: Path) -> Path:
    """Study seed after seed until the time is up; return the file of the lines."""
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * minutes
    path = out / "routing_replay.jsonl"
    path.touch()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = pool.imap_unordered(work, [(seed, NATURAL, str(path)) for seed in seeds])
        for _ in seeds:
            try:
                done.next(timeout=max(1.0, ends - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
        pool.terminate()
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("routing_replay", __doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--add",
        type=Path,
        nargs="*",
        default=[],
        help="replays of earlier sessions, .jsonl or .jsonl.gz",
    )
    options = parser.parse_args(argv)
    paths = list(options.add)
    if options.seeds:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        paths.append(run(seeds, options.workers, options.minutes, options.out))
    result = setting("routing_replay", argv) | {
        "scenario": NATURAL.name,
        "after": AFTER,
        "rows": summarise(read(paths), list(CHANGES)),
    }
    save("routing_replay", result, page(result), options.out)
    say(result, page(result), options.json)


if __name__ == "__main__":
    main()
