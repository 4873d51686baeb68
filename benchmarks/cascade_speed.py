"""Benchmark of `geodiag cascade`: time and memory for a long run of a deep model.

    geodiag bench cascade_speed [--steps 100000] [--layers 32] [--experts 8] [--run DIR]

The rows are made up, the files are real: the writer of a training writes them. Every signal of
every layer and expert is noise around a drift of its own. Before each of the two spikes an expert's
activations grow, then the residual stream, then the loss.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from geodiag.anomaly.metric_roles import SIGNALS
from geodiag.benchmarks.report import Parser, save, say, setting, where
from geodiag.events import Event
from geodiag.run import Run

CHUNK = 200
"""Steps written at a time; the writer makes parts of them and merges these, as in a training."""
LEAD = 20
GROWTH = 0.35
"""By which the logarithm of the fault's activations grows a step."""


def write(
    path: Path, *, steps: int, layers: int, experts: int, seed: int = 0
) -> list[tuple[int, int]]:
    """Write the run; return the step and the layer at which each of its two cascades began."""
    rng = np.random.default_rng(seed)
    calm = np.random.default_rng(seed + 1)
    origins = [(steps // 2, layers // 3), (steps - 100, layers // 2)]
    run = Run.create(
        path, found={"sites": 2 * layers, "routers": layers, "experts": layers * experts}
    )
    drift = rng.uniform(0.5, 2.0, (len(SIGNALS), layers))
    for first in range(0, steps, CHUNK):
        step_S = np.arange(first, min(first + CHUNK, steps))
        ill_S = sum(
            (
                np.clip(step_S - at, 0, 2 * LEAD) * ((step_S >= at) & (step_S < at + 60))
                for at, _ in origins
            )
        )
        loss = 2.0 + 0.02 * rng.standard_normal(len(step_S)) + 0.15 * np.maximum(ill_S - LEAD, 0)
        for table, keys in (("layers", 2), ("experts", experts)):
            run.append(table, _rows(table, rng, step_S, layers, keys, drift, origins))
        scores = {f"stage{i}_score": calm.gamma(4, 0.5, len(step_S)) for i in (1, 2, 3)}
        outcome = {"step": step_S, "loss": loss, "grad_norm": calm.lognormal(0, 0.2, len(step_S))}
        run.append("steps", outcome | scores | {"lr": np.full(len(step_S), 1e-3)})
    for at, _ in origins:
        data = {
            "kind": "spike",
            "detected": at + LEAD + 3,
            "onset": at + LEAD + 1,
            "peak": None,
            "end": None,
            "score": 9,
        }
        run.event(
            Event(step=at + LEAD + 3, kind="spike", message="the loss left its trend", data=data)
        )
    run.close()
    return origins


def _rows(
    table: str,
    rng: np.random.Generator,
    step_S: np.ndarray,
    layers: int,
    keys: int,
    drift: np.ndarray,
    origins: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    """Return one chunk of a table: noise in every signal, and the faults."""
    shape = (len(step_S), layers, keys)
    index = np.broadcast_to(np.arange(layers)[None, :, None], shape)
    key = np.broadcast_to(np.arange(keys)[None, None, :], shape)
    columns: dict[str, Any] = {"step": np.repeat(step_S, layers * keys), "layer": index.ravel()}
    columns |= (
        {"expert": key.ravel()}
        if table == "experts"
        else {"site": ["attn", "ffn"] * (shape[0] * layers)}
    )
    for n, (where_, name) in enumerate(SIGNALS):
        if where_ != table:
            continue
        noise = 0.05 * rng.standard_normal(shape, dtype=np.float32)
        values = noise + np.log(drift[n])[None, :, None].astype(np.float32)
        for at, layer in origins:
            grown = np.clip(step_S - at, 0, 2 * LEAD) * ((step_S >= at) & (step_S < at + 60))
            if name in ("act_rms", "act_amax", "gate_amax"):
                values[:, layer, -1] += GROWTH * grown
            if name.startswith("stream"):
                values[:, layer:] += 0.5 * GROWTH * np.maximum(grown - 4, 0)[:, None, None]
        columns[name] = np.exp(values).ravel()
    return columns


def measure(path: Path, times: int) -> dict[str, Any]:
    """Return wall time and peak memory of the command, each time in a process of its own."""
    seconds = []
    command = [sys.executable, "-m", "geodiag.cli", "cascade", str(path), "--json"]
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (used.ru_utime + used.ru_stime) / times
    return {
        "seconds": statistics.median(seconds),
        "each": seconds,
        "cpu_seconds": busy,
        "bytes": used.ru_maxrss * 1024,
        "load": os.getloadavg()[0],
    }


def page(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    asked = result["settings"]
    lines = [
        "# How long the cascade takes",
        "",
        f"{asked['steps']:,} steps of {asked['layers']} layers and {asked['experts']} experts, "
        f"{result['run_bytes'] / 1e9:.1f} GB, two spikes.",
        f"`geodiag cascade RUN --json`, {asked['times']} times: **{result['cpu_seconds']:.1f} "
        "s** of processor time, "
        f"{result['bytes'] / 1e6:.0f} MB at most;",
        f"on the clock {min(result['each']):.1f} s at best, {result['seconds']:.1f} s in the "
        "median, "
        f"while the machine had a load of {result['load']:.0f}.",
        "",
        where(result),
        "",
        f"    {result['command']}",
    ]
    return "\n".join(lines)


def add_size(parser: Parser, steps: int, experts: int) -> None:
    """Add the options of a benchmark on a long run: length, repetitions, folder."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=experts)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument(
        "--run", type=Path, default=None, help="keep the run here, and use it if it is there"
    )


@contextmanager
def long_run(options: Namespace) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the run and its description; remove the run afterwards unless --run is given."""
    home = options.run or Path(tempfile.mkdtemp()) / "long"
    try:
        if not home.exists():
            write(home, steps=options.steps, layers=options.layers, experts=options.experts)
        size = sum(f.stat().st_size for f in home.rglob("*") if f.is_file())
        asked = {n: getattr(options, n) for n in ("steps", "layers", "experts", "times")}
        yield home, {"settings": asked, "run_bytes": size}
    finally:
        if options.run is None:
            shutil.rmtree(home.parent)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("cascade_speed", __doc__)
    add_size(parser, steps=100_000, experts=8)
    options = parser.parse_args(argv)
    with long_run(options) as (home, settings):
        result = setting("cascade_speed", argv) | settings | measure(home, options.times)
    save("cascade_speed", result, page(result), options.out)
    say(result, page(result), options.json)


if __name__ == "__main__":
    main()
