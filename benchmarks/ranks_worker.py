"""The part of `geodiag bench ranks` that runs on each rank: equal losses, and time of a step."""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from geodiag.cli.train_options import Options, Parallel, Size
from geodiag.cli.training import Training
from geodiag.hooks.probes import runner as probes

PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp")
COMPARED = 12
"""Steps whose losses are compared, probes among them."""


def measure(out: Path, device: str, size: Size, sequences: int, steps: int) -> None:
    """Write `worker.json` with equality and cost for each kind of parallelism, after each part."""
    found: dict[str, Any] = {}
    for parallel in PARALLEL:
        options = Options(
            size=size, device=device, sequences=sequences, parallel=parallel, steps=10_000
        )
        found[parallel] = {
            "same": same(replace(options, size="tiny", deterministic=True), out / parallel),
            "cost": cost(replace(options, run=out / parallel / "cost"), steps),
            "backend": dist.get_backend(),
        }
        if dist.get_rank() == 0:
            (out / "worker.json").write_text(json.dumps(found))


def same(options: Options, out: Path) -> dict[str, Any]:
    """Return the largest differences of the losses with and without geodiag.

    A second training without geodiag is the control. In a third, probes fail on one rank: that may
    neither block the others nor change a loss.
    """
    watched = losses(replace(options, run=out / "watched", probe_every=4), watched=True)
    bare, again = (
        losses(replace(options, run=out / name), watched=False) for name in ("bare", "again")
    )
    with mock.patch.object(probes, "tear", _fails) if dist.get_rank() == 1 else nullcontext():
        broken = losses(replace(options, run=out / "broken", probe_every=4), watched=True)
    found = {"with_geodiag": watched, "without_again": again, "with_a_broken_probe": broken}
    apart = [max(abs(a - b) for a, b in zip(bare, other, strict=True)) for other in found.values()]
    worst = torch.tensor(apart, device=_device_of_collectives())
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return {"steps": len(bare)} | dict(zip(found, worst.tolist(), strict=True))


def _fails(*_: Any) -> Any:
    raise ArithmeticError("on purpose, on one rank")


def losses(options: Options, watched: bool) -> list[float]:
    with _training(options) as training:
        if not watched:
            training.monitor.close()  # takes the hooks off
        return [_step(training, number, watched)[0] for number in range(COMPARED)]


def cost(options: Options, steps: int) -> dict[str, Any]:
    """Return the median times of a step with and without geodiag, at the usual cadences."""
    with _training(options) as training:
        gpu = training.device.type == "cuda"
        for number in range(10):  # the first probes, which begin the spectra of the weights
            _step(training, number, watched=True)
        watched = [_step(training, n, watched=True)[1] for n in range(steps)]
        training.monitor.close()
        bare = [_step(training, n, watched=False)[1] for n in range(steps)]
        return {
            "bare_ms": 1e3 * statistics.median(bare),
            "watched_ms": 1e3 * statistics.median(watched),
            "watched_mean_ms": 1e3 * statistics.fmean(watched),
            "steps": steps,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
        }


@contextmanager
def _training(options: Options) -> Iterator[Training]:
    """Yield a training in this process group; the process group stays open afterwards."""
    training = Training(options, quiet=True)
    try:
        yield training
    finally:
        training.monitor.close()
        if training.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _step(training: Training, number: int, watched: bool) -> tuple[float, float]:
    """Return loss and seconds of one step."""
    (batch,) = training._split(training.loader.batch(number % 8))
    batch = training._to_device(batch)
    _wait(training)
    began = time.perf_counter()
    training.trainer.accumulate(batch)
    done = training.trainer.update()
    if watched:
        training.monitor.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
    _wait(training)
    return float(done.loss), time.perf_counter() - began


def _wait(training: Training) -> None:
    if training.device.type == "cuda":
        torch.cuda.synchronize()


def _device_of_collectives() -> torch.device:
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
