"""Benchmark of the time that routing by older weights adds to a training step.

    geodiag bench routing_cost [--size 3b] [--sequences 4] [--seconds 60] [--steps 2]
    [--device cuda]

One model is trained all the time; the arms take turns, and the first arm changes from round to
round. In its turn an arm registers its hooks, warms up and times so many steps. The time of a step
divided by that of the bare steps of the same round is one ratio. `bare again` is the control.
`capture alone` is the time of the second forward alone as a share of a bare step, and `… of forward
and backward` as a share of a step without the optimizer: the cost in the limit of many
micro-batches per step.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import cycle
from typing import Any

import torch

from geodiag.benchmarks.overhead import Estimate
from geodiag.benchmarks.report import Parser, save, say, setting, where
from geodiag.hooks.control.controller import Controller
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.routing.router_lag import RouterLag
from geodiag.reference_models.config import sized
from geodiag.reference_models.data import Batch, Loader
from geodiag.reference_models.text import open_corpus
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer
from geodiag.spikes.detector import SpikeDetector

DELAY = 1
Make = Callable[["Bench"], Rerouting | None]


def _ahead(**options: Any) -> Make:
    return lambda b: AnticipatoryRouting(b.trainer.model, DELAY, forward=b.forward, **options)


ARMS: dict[str, tuple[Make, bool]] = {
    "bare": (lambda _b: None, False),
    "bare again": (lambda _b: None, False),
    "anticipatory, off, controller watching": (_ahead(), False),
    "anticipatory, on": (_ahead(), True),
    "anticipatory, on, ids in pinned host memory": (_ahead(device_bytes=0), True),
    "router-lag, off, controller watching": (lambda b: RouterLag(b.trainer.model, DELAY), False),
    "router-lag, on": (lambda b: RouterLag(b.trainer.model, DELAY), True),
}
"""Arm → its routing, and whether it is switched on."""


class Bench:
    """One training on which the arms take turns."""

    def __init__(self, size: str, sequences: int, device: str, data: str = "stdlib") -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        shape = sized(size)
        with self.device:
            model = Transformer(shape)
        self.trainer: Trainer = Trainer(model, TrainConfig(steps=10_000, sequences=sequences))
        loader = Loader(open_corpus(data), sequences, shape.sequence)
        self.batches = cycle([loader.batch(s).to(self.device) for s in range(16)])
        self.detector = SpikeDetector()
        self.controller = Controller()
        self._steps = 0

    @staticmethod
    def forward(model: torch.nn.Module, batch: Batch) -> Any:
        return model(batch.token_ids_BS)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def turn(self, make: Make, on: bool, steps: int) -> float:
        """Return the seconds per step of one arm."""
        routing = make(self)
        data: Iterator[Batch] = routing.batches(self.batches) if routing else self.batches
        if routing and on:
            routing.enable()
        began = 0.0
        for done, batch in enumerate(data, 1):
            self.trainer.step(batch)
            if routing:
                # The monitor judges a loss some steps later, so that no step waits for its loss;
                # here the verdict is on a made-up loss.
                self._steps += 1
                verdict = self.detector.update(self._steps, 3.0 + 0.01 * (self._steps % 5))
                self.controller.decide(self._steps, verdict)
            if done == DELAY + 1:
                began = self.now()
            if done == DELAY + 1 + steps:
                break
        seconds = (self.now() - began) / steps
        if routing:
            assert routing.mode == ("on" if on else "off"), routing.mode
            routing.remove()
        return seconds

    def alone(self, turns: int) -> dict[str, float]:
        """Return the seconds of a capture, of a full forward, and of forward and backward."""
        batch = next(self.batches)
        found = {}
        routing = AnticipatoryRouting(self.trainer.model, DELAY, forward=self.forward)
        parts: dict[str, Callable[[], Any]] = {
            "capture": lambda: routing._capture(batch),
            "forward to its end": lambda: self._whole(batch),
            "forward and backward": lambda: self.trainer.accumulate(batch),
        }
        for name, run in parts.items():
            times = []
            for _ in range(turns + 1):
                began = self.now()
                run()
                times.append(self.now() - began)
                self.trainer._losses.clear()
            found[name] = statistics.median(times[1:])
        routing.remove()
        self.trainer.model.zero_grad()
        return found

    @torch.no_grad()
    def _whole(self, batch: Batch) -> Any:
        return self.forward(self.trainer.model, batch)


def run(
    size: str, sequences: int, seconds: float, steps: int, device: str, but: Sequence[str] = ()
) -> dict[str, Any]:
    """Return every arm's relative time and the parts alone; as many rounds as `seconds` allow."""
    chosen = [name for name in ARMS if name == "bare" or not any(word in name for word in but)]
    bench = Bench(size, sequences, device)
    times = {name: list[float]() for name in chosen}
    bench.turn(*ARMS["bare"], steps)
    alone = bench.alone(3)
    names = chosen
    rounds = 0
    began = time.perf_counter()
    while rounds < 2 or time.perf_counter() - began < seconds * rounds / (rounds + 1):
        start = rounds % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(bench.turn(*ARMS[name], steps))
        rounds += 1
    step = statistics.median(times["bare"])
    shape = bench.trainer.model.config
    found: dict[str, Any] = {
        "size": size,
        "parameters": sum(p.numel() for p in bench.trainer.model.parameters()),
        "tokens_a_step": sequences * shape.sequence,
        "sequence": shape.sequence,
        "rounds": rounds,
        "steps": steps,
        "step_seconds": step,
        "arms": {
            name: asdict(Estimate.of([t / b for t, b in zip(found, times["bare"], strict=True)]))
            for name, found in times.items()
        },
        "alone": alone,
        "capture_of_step": alone["capture"] / step,
        "capture_of_forward_and_backward": alone["capture"] / alone["forward and backward"],
    }
    if bench.device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def markdown(result: dict[str, Any]) -> str:
    lines = ["# What routing by older weights costs", "", where(result), ""]
    for r in result["runs"]:
        alone = {name: f"{1000 * t:.1f} ms" for name, t in r["alone"].items()}
        of_step, of_both = (
            100 * r[k] for k in ("capture_of_step", "capture_of_forward_and_backward")
        )
        lines += [
            f"## `{r['size']}`, {r['tokens_a_step']} tokens a step, sequence {r['sequence']}",
            "",
            f"{r['parameters'] / 1e6:,.0f} M parameters. A bare step takes "
            f"{1000 * r['step_seconds']:.1f} ms, of which",
            f"forward and backward {alone['forward and backward']}. Time over the bare step's of "
            "the same round,",
            f"{r['rounds']} rounds of {r['steps']} steps: median and 95 % interval.",
            "",
            "| arm | time over bare | 95 % interval |",
            "|---|---|---|",
            *(
                f"| {n} | {a['median']:.4f} | {a['low']:.4f} – {a['high']:.4f} |"
                for n, a in r["arms"].items()
            ),
            "",
            f"The capture by itself takes {alone['capture']}: {of_step:.1f} % of this step, "
            f"{of_both:.1f} % of forward",
            f"and backward alone. A forward to its end takes {alone['forward to its end']}.",
            "",
        ]
    return "\n".join([*lines, f"    {result['command']}", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("routing_cost", __doc__)
    parser.add_argument("--size", nargs="+", default=["tiny"])
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[8], help="one a size, or one for all"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds of a size")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a turn")
    parser.add_argument(
        "--but", nargs="*", default=[], help="leave out arms whose name has one of these words"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    sequences = (
        options.sequences * len(options.size) if len(options.sequences) == 1 else options.sequences
    )
    result = setting("routing_cost", argv, options.device)
    result["runs"] = []
    for size, count in zip(options.size, sequences, strict=True):
        result["runs"].append(
            run(size, count, options.seconds, options.steps, options.device, options.but)
        )
        save(
            "routing_cost", result, markdown(result), options.out
        )  # a later size that fails loses nothing
    say(result, markdown(result), options.json)


if __name__ == "__main__":
    main()
