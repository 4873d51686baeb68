"""Benchmark of a training step: residual connections, kernels, recomputation and recording.

    geodiag bench step_time [--size 3b small] [--sequences 4 8] [--steps 8] [--arms plain mhc …]
    [--device cuda]

Each arm is a training of its own, with the same seed and the same random tokens. Forward with
backward, and the update, are timed separately. The name of an arm is its configuration:
RESIDUAL[+reference][+mhc|+layers][+monitor].
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import geodiag
from geodiag.benchmarks.report import Parser, present, save, say, setting, where
from geodiag.reference_models.config import sized
from geodiag.reference_models.data import Batch
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer

ARMS = ("plain", "mhc", "mhc+monitor", "mhc+mhc", "plain+layers", "mhc+layers", "mhc+reference")
BATCHES = 4


def trainer_of(
    arm: str, size: str, sequences: int, device: torch.device, layers: int | None = None
) -> Trainer:
    """Return the trainer that the name of an arm describes."""
    residual, *options = arm.split("+")
    recompute = next((o for o in options if o in ("mhc", "layers")), "none")
    changes: dict[str, Any] = {"recompute": recompute, "dtype": "bfloat16"} | (
        {"layers": layers} if layers else {}
    )
    kernels = "reference" if "reference" in options else "auto"
    torch.manual_seed(0)
    with device:
        model = Transformer(sized(size, residual, kernels=kernels, **changes))  # type: ignore[arg-type]
    return Trainer(model, TrainConfig(steps=10_000, sequences=sequences))


def batches(size: str, sequences: int, device: torch.device) -> list[Batch]:
    """Return batches of random tokens: balanced experts, and the same data for all arms."""
    shape = sized(size)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(BATCHES):
        ids = torch.randint(shape.vocab, (sequences, shape.sequence + 1), generator=generator).to(
            device
        )
        found.append(
            Batch(step, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), ("random",) * sequences)
        )
    return found


def launches(step: Any, device: torch.device) -> int:
    """Return the kernels that one step launches, copies included; on a CPU, operators called."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        step()
        _wait(device)
    events = seen.events() or []
    if device.type == "cuda":
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
    return sum(e.name.startswith("aten::") for e in events)


def time_arm(
    arm: str, size: str, data: list[Batch], steps: int, device: torch.device, layers: int | None
) -> dict:
    """Return the milliseconds of an arm's steps, its peak memory and its launches."""
    trainer = trainer_of(arm, size, len(data[0].domain_B), device, layers)
    with tempfile.TemporaryDirectory() as folder:
        monitor = None
        if "monitor" in arm.split("+"):
            probe = (data[0].token_ids_BS[:1],)
            monitor = geodiag.attach(
                trainer.model,
                trainer.optimizers,
                Path(folder) / "run",
                probe=probe,
                probe_every=1 << 30,
                quiet=True,
            )
        passes = []
        whole = []

        def step(i: int) -> None:
            began = time.perf_counter()
            trainer.accumulate(data[i % BATCHES])
            _wait(device)
            passes.append((time.perf_counter() - began) * 1e3)
            done = trainer.update()
            if monitor is not None:
                monitor.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
            _wait(device)
            whole.append((time.perf_counter() - began) * 1e3)

        for i in range(3):  # compiles kernels, allocates
            step(i)
        passes.clear()
        whole.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            retries = torch.cuda.memory_stats()["num_alloc_retries"]
        for i in range(steps):
            step(i)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        found = {
            "arm": arm,
            "forward_backward_ms": statistics.median(passes),
            "step_ms": statistics.median(whole),
            "each_step_ms": list(whole),
            "peak_gb": peak,
            "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"] - retries
            if peak
            else 0,
            "launches": launches(lambda: step(0), device),
        }
        if monitor is not None:
            monitor.close()
    return found


def _plain(arm: str) -> str:
    """Return the arm to compare with: one stream, and the same recomputation of layers."""
    return "plain+layers" if "layers" in arm.split("+") else "plain"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(
    size: str = "3b",
    sequences: int = 4,
    steps: int = 8,
    arms: Sequence[str] = ARMS,
    device: str = "cuda",
    layers: int | None = None,
) -> dict[str, Any]:
    """Return time, memory and launches of each arm, or the error of an arm that does not fit."""
    there = torch.device(device)
    data = batches(size, sequences, there)
    rows: list[dict] = []
    for arm in arms:
        try:
            rows.append(time_arm(arm, size, data, steps, there, layers))
        except torch.OutOfMemoryError as e:
            rows.append({"arm": arm, "failed": str(e).splitlines()[0]})
        gc.collect()
        if there.type == "cuda":
            torch.cuda.empty_cache()
    tokens = sequences * sized(size).sequence
    return {
        "size": size,
        "tokens": tokens,
        "layers": layers or sized(size).layers,
        "steps": steps,
        "arms": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    lines = ["# What a training step costs", "", where(result), ""]
    for part in result["runs"]:
        lines += [
            f"`{part['size']}`, {part['layers']} layers, {part['tokens']} tokens a step, "
            "bfloat16; medians of "
            f"{part['steps']} steps.",
            "",
            "| arm | forward + backward, ms | over plain | whole step, ms | over plain | peak, "
            "GB | launches |",
            "|---|---|---|---|---|---|---|",
        ]
        done = {a["arm"]: a for a in part["arms"] if "failed" not in a}
        for arm in part["arms"]:
            if "failed" in arm:
                lines.append(f"| {arm['arm']} | {arm['failed']} | | | | | |")
                continue
            plain = done.get(_plain(arm["arm"]))
            passes, step = (
                f"{arm[k]:.1f} | {arm[k] / plain[k] - 1:+.1%}" if plain else f"{arm[k]:.1f} |"
                for k in ("forward_backward_ms", "step_ms")
            )
            peak = "" if arm["peak_gb"] is None else f"{arm['peak_gb']:.1f}"
            short = " (short of memory)" if arm["allocator_retries"] else ""
            lines.append(
                f"| {arm['arm']} | {passes} | {step} | {peak}{short} | {arm['launches']} |"
            )
        lines.append("")
    return "\n".join([*lines, f"    {result['command']}", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("step_time", __doc__)
    parser.add_argument("--size", nargs="+", default=["3b", "small"])
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[4, 8], help="a step, for each size"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="so many layers instead of the size's own")
    options = parser.parse_args(argv)
    result = setting("step_time", argv, present(options.device))
    result["runs"] = []
    for size, sequences in zip(options.size, options.sequences, strict=True):
        found = run(size, sequences, options.steps, options.arms, options.device, options.layers)
        result["runs"].append(found)
        save("step_time", result, markdown(result), options.out)
    say(result, markdown(result), options.json)


if __name__ == "__main__":
    main()
