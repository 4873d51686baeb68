"""Benchmark of snapshots and rollback: their cost, and whether the state is restored to the bit.

    geodiag bench rollback [--size 3b] [--sequences 4] [--rounds 5] [--device cuda]

One model is trained; steps after a snapshot alternate with steps without one. The copy runs beside
forward and backward, so that the cost of a snapshot is the time that it adds to the step, not the
time of the copy. The first snapshots allocate their host memory (page-locked beside a GPU) once.
Then the training rolls back and repeats the same steps: weights, optimizer state and losses are
compared bit by bit. The losses are compared with the deterministic backward, without which a GPU
does not repeat itself; `--free` trains without it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from geodiag.benchmarks.report import Parser, save, say, setting, where
from geodiag.hooks.snapshots.snapshots import Snapshots
from geodiag.reference_models.config import sized
from geodiag.reference_models.data import Loader
from geodiag.reference_models.text import open_corpus
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer

KEEP = 2
EVERY = 25
"""Steps between snapshots for the cost per step on the page."""


class Bench:
    """One training with a timer."""

    def __init__(self, size: str, sequences: int, device: str, data: str = "stdlib") -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        shape = sized(size)
        with self.device:
            model = Transformer(shape)
        self.trainer = Trainer(model, TrainConfig(steps=10_000, sequences=sequences))
        loader = Loader(open_corpus(data), sequences, shape.sequence)
        self.batches = [loader.batch(s).to(self.device) for s in range(8)]
        self.snapshots = Snapshots(model, self.trainer.optimizers, self.trainer.progress, keep=KEEP)
        self._taken = 0

    def timed(self, work: Callable[[], Any]) -> float:
        """Return the seconds until the device has finished `work`."""
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def step(self) -> float:
        """Train one step; return its loss."""
        done = self.trainer.step(self.batches[self.trainer.steps_done % len(self.batches)])
        return float(done.loss)

    def take(self) -> None:
        self._taken += 1
        self.snapshots.take(self._taken, {})

    def state(self) -> list[Tensor]:
        """Return a copy of every weight, buffer and optimizer state."""
        model = self.trainer.model
        tensors = [*model.parameters(), *model.buffers()]
        for optimizer in self.trainer.optimizers:
            tensors += [
                v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)
            ]
        return [t.detach().clone() for t in tensors]


def run(size: str, sequences: int, rounds: int, device: str, free: bool = False) -> dict[str, Any]:
    bench = Bench(size, sequences, device)
    for _ in range(2):
        bench.step()
    first = [bench.timed(bench.take) for _ in range(KEEP)]
    calls = []
    plain = []
    with_snapshot = []
    for _ in range(rounds):
        plain.append(bench.timed(bench.step))

        def both() -> None:
            began = time.perf_counter()
            bench.take()
            calls.append(time.perf_counter() - began)
            bench.step()

        with_snapshot.append(bench.timed(both))
    bench.trainer.config = replace(bench.trainer.config, deterministic=not free)
    copies = [bench.timed(bench.take) for _ in range(2)]
    before = bench.state()
    size_bytes = bench.snapshots._in_memory[-1].buffer.size
    once = [bench.step() for _ in range(2)]
    changed = sum(not torch.equal(a, b) for a, b in zip(before, bench.state(), strict=True))
    restore = bench.timed(lambda: bench.snapshots.restore(bench._taken))
    differ = sum(not torch.equal(a, b) for a, b in zip(before, bench.state(), strict=True))
    again = [bench.step() for _ in range(2)]
    extra = [w - p for w, p in zip(with_snapshot, plain, strict=True)]
    bench.snapshots.close()
    return {
        "size": size,
        "parameters": sum(p.numel() for p in bench.trainer.model.parameters()),
        "tokens_a_step": sequences * bench.trainer.model.config.sequence,
        "snapshot_bytes": size_bytes,
        "first_seconds": first,
        "rounds": rounds,
        "step_seconds": statistics.median(plain),
        "call_seconds": statistics.median(calls),
        "copy_seconds": statistics.median(copies),
        "extra_seconds": {"median": statistics.median(extra), "most": max(extra)},
        "restore_seconds": restore,
        "tensors": len(before),
        "changed_by_two_steps": changed,
        "differ_after_restore": differ,
        "losses_repeat": once == again,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = ["# What snapshots and going back cost", "", where(result), ""]
    for r in result["runs"]:
        extra = r["extra_seconds"]
        step = r["step_seconds"]
        share = 100 * extra["median"] / step / EVERY
        firsts = " and ".join(f"{s:.2f}" for s in r["first_seconds"])
        same = "the same bits" if r["losses_repeat"] else "not the same bits"
        lines += [
            f"## `{r['size']}`, {r['tokens_a_step']} tokens a step",
            "",
            "| what | |",
            "|---|---|",
            f"| parameters; bytes of a snapshot | {r['parameters'] / 1e6:,.0f} M; "
            f"{r['snapshot_bytes'] / 1e9:.2f} GB |",
            f"| a step | {1000 * step:.0f} ms |",
            f"| how much longer with a snapshot, median and most of {r['rounds']} | "
            f"{1000 * extra['median']:.0f} and {1000 * extra['most']:.0f} ms |",
            f"| that, on every {EVERY}th step | {share:.2f} % |",
            f"| of the host's time; the copy by itself | {1000 * r['call_seconds']:.0f} ms; "
            f"{1000 * r['copy_seconds']:.0f} ms |",
            f"| the first {len(r['first_seconds'])}, which make their room | {firsts} s |",
            f"| going back | **{r['restore_seconds']:.2f} s** |",
            "| tensors that two steps changed; that differ after going back | "
            f"{r['changed_by_two_steps']} of "
            f"{r['tensors']}; {r['differ_after_restore']} |",
            f"| losses of the two steps, repeated | {same} |",
            "",
        ]
    return "\n".join([*lines, f"    {result['command']}", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("rollback", __doc__)
    parser.add_argument("--size", nargs="+", default=["tiny"])
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[8], help="one a size, or one for all"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--free", action="store_true", help="repeat the steps without the deterministic backward"
    )
    options = parser.parse_args(argv)
    sequences = (
        options.sequences * len(options.size) if len(options.sequences) == 1 else options.sequences
    )
    result = setting("rollback", argv, options.device)
    result["runs"] = []
    for size, count in zip(options.size, sequences, strict=True):
        result["runs"].append(run(size, count, options.rounds, options.device, options.free))
        save(
            "rollback", result, markdown(result), options.out
        )  # a later size that fails loses nothing
    say(result, markdown(result), options.json)


if __name__ == "__main__":
    main()
