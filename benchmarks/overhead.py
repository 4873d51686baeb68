"""Benchmark of recording: the same training step with and without geodiag, in turns.

    geodiag bench overhead [--size tiny] [--rounds 12] [--block 20] [--threads 1 2] [--device cpu]

Each arm is a training of its own, with the same seed and the same batches. In a round every arm
runs one block of steps; the first arm changes from round to round. The time of a block divided by
that of the bare block of the same round is one ratio. Medians have distribution-free 95 %
intervals. `bare again` is the control: its interval has to contain 1, or the machine was too busy
to measure. Results: benchmarks/results/overhead.json and overhead.md.
"""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

import geodiag
from geodiag.benchmarks.report import Parser, save, say, setting, where
from geodiag.defaults import PROBE_EVERY
from geodiag.hooks.monitor import Monitor
from geodiag.reference_models.config import sized
from geodiag.reference_models.data import Batch, Loader
from geodiag.reference_models.text import open_corpus
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer

ARMS: dict[str, int | None] = {
    "bare": None,
    "bare again": None,
    "every step": 1,
    "every 10th step": 10,
}
"""Arm → steps between samples of the layers, every monitor on; None for no geodiag at all."""


@dataclass(frozen=True)
class Estimate:
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return the median with its interval by order statistics.

        The true median is between these ranks with a probability of at least 95 %, for any
        distribution. Fewer than six values allow no such interval; then it is their whole range.
        """
        ordered = sorted(values)
        n = len(values)
        below = 0
        tail = 0.0
        while (tail := tail + math.comb(n, below) / 2**n) <= 0.025:
            below += 1
        skip = max(below - 1, 0)
        return cls(statistics.median(ordered), ordered[skip], ordered[n - 1 - skip])


class Arm:
    """One training, with or without geodiag."""

    def __init__(
        self, size: str, every: int | None, batches: list[Batch], device: torch.device, run: Path
    ) -> None:
        torch.manual_seed(0)
        with device:
            model = Transformer(sized(size))
        self.trainer = Trainer(model, TrainConfig(steps=10_000, sequences=len(batches[0].domain_B)))
        self.device = device
        self.batches = cycle(batches)
        self.losses: list[torch.Tensor] = []
        self.monitor: Monitor | None = None
        if every is not None:
            probe = (batches[0].token_ids_BS,)
            self.monitor = geodiag.attach(
                model,
                self.trainer.optimizers,
                run,
                probe=probe,
                probe_every=PROBE_EVERY,
                every=every,
                quiet=True,
            )

    def block(self, steps: int) -> float:
        """Train so many steps; return the seconds per step."""
        self._wait()
        began = time.perf_counter()
        for batch in islice(self.batches, steps):
            done = self.trainer.step(batch)
            if self.monitor is not None:
                self.monitor.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
            self.losses.append(done.loss)
        self._wait()
        return (time.perf_counter() - began) / steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


def compare(
    size: str,
    threads: int,
    rounds: int,
    block: int,
    sequences: int = 8,
    device: str = "cpu",
    data: str = "stdlib",
) -> dict[str, Any]:
    """Return every arm's steps per second, and its time relative to the bare training."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    shape = sized(size)
    loader = Loader(open_corpus(data), sequences, shape.sequence)
    batches = [loader.batch(step).to(where) for step in range(4 * PROBE_EVERY)]
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        arms = {n: Arm(size, every, batches, where, Path(folder) / n) for n, every in ARMS.items()}
        for arm in arms.values():
            arm.block(block)  # first steps allocate what the others use again
        names = list(arms)
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                seconds[name].append(arms[name].block(block))
        for arm in arms.values():
            arm.close()
        losses = {name: torch.stack(arm.losses).tolist() for name, arm in arms.items()}
    return {
        "threads": threads,
        "losses_bitwise_equal": all(kept == losses["bare"] for kept in losses.values()),
        "arms": {
            name: {
                "steps_per_second": 1 / statistics.median(found),
                "ratio": asdict(
                    Estimate.of([a / b for a, b in zip(found, seconds["bare"], strict=True)])
                ),
                "seconds_a_step": found,
            }
            for name, found in seconds.items()
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    settings = result["settings"]
    lines = [
        "# What recording costs",
        "",
        f"`{settings['size']}` mHC, {settings['sequences']} sequences a step, every monitor on, "
        "probes "
        "and weight spectra",
        f"every {PROBE_EVERY} steps, against the same steps without geodiag, in turns: "
        f"{settings['rounds']} rounds of",
        f"blocks of {settings['block']} steps. Time over the bare block's of the same round: "
        "median "
        "and 95 % interval.",
        "",
        f"{where(result)} Load before: {result['load_before']:.2f}.",
        "",
        "| threads | layers sampled | steps/s | time over bare | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        for name, arm in run["arms"].items():
            r = arm["ratio"]
            ratio, within = (
                (f"{r['median']:.3f}", f"{r['low']:.3f} – {r['high']:.3f}")
                if name != "bare"
                else ("", "")
            )
            lines.append(
                f"| {run['threads']} | {name} | {arm['steps_per_second']:.2f} | {ratio} | "
                f"{within} |"
            )
    equal = all(run["losses_bitwise_equal"] for run in result["runs"])
    lines += ["", f"Losses of all arms are {'' if equal else 'NOT '}bit for bit the same."]
    lines += [f"\n**{warning}**" for warning in result["warnings"]]
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def warnings(result: dict[str, Any]) -> list[str]:
    """Return the reasons, if any, why these numbers are not reliable."""
    found = []
    if result["load_before"] > 0.5:
        found.append(
            f"The machine was busy: load {result['load_before']:.2f} before the first block."
        )
    for run in result["runs"]:
        control = run["arms"]["bare again"]["ratio"]
        if not control["low"] <= 1 <= control["high"]:
            found.append(
                f"The control is off at {run['threads']} threads: bare over bare is "
                f"{control['median']:.3f}."
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("overhead", __doc__)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--block",
        type=int,
        default=20,
        help="steps; a multiple of ten, so that each has its probes",
    )
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    if options.block % PROBE_EVERY:
        parser.error(f"--block is a multiple of {PROBE_EVERY}")
    result = setting("overhead", argv, options.device) | {
        "settings": {
            k: getattr(options, k) for k in ("size", "rounds", "block", "sequences", "device")
        },
        "load_before": os.getloadavg()[0],
    }
    result["runs"] = [
        compare(options.size, n, options.rounds, options.block, options.sequences, options.device)
        for n in options.threads
    ]
    result["warnings"] = warnings(result)
    save("overhead", result, markdown(result), options.out)
    say(result, markdown(result), options.json)


if __name__ == "__main__":
    main()
