"""Benchmark of the probes: cost of each alone, and of all at their default cadence.

A training without geodiag gives the time of a step; then the probes run on its model, as the
monitor runs them. Times are medians, with the device synchronised before and after.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from geodiag.benchmarks.report import Parser, save, say, setting, where
from geodiag.defaults import PROBE_EVERY
from geodiag.hooks.adapters import find_layout
from geodiag.hooks.failure_guard import RaisingGuard
from geodiag.hooks.probes.batch import PROBE_TOKENS
from geodiag.hooks.probes.runner import PROBES, Probes
from geodiag.metrics.cadence import Cadence
from geodiag.metrics.registry import keys_of
from geodiag.reference_models.config import sized
from geodiag.reference_models.data import Batch
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer


def main(argv: Sequence[str] | None = None) -> None:
    """Run `geodiag bench probes`."""
    parser = Parser("probes", __doc__)
    parser.add_argument(
        "--sizes", nargs="+", default=["small", "3b"], help="model sizes [%(default)s]"
    )
    parser.add_argument("--sequences", type=int, default=8, help="sequences a step [%(default)s]")
    parser.add_argument(
        "--micro-batches", type=int, default=2, help="micro-batches of a step [%(default)s]"
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps [%(default)s]")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs of each probe [%(default)s]"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]"
    )
    args = parser.parse_args(argv)
    result = setting("probes", argv, args.device) | {"sizes": {}}
    for size in args.sizes:
        try:
            result["sizes"][size] = measured(size, args)
        except torch.OutOfMemoryError:
            result["sizes"][size] = {"failed": "out of memory; pass more --micro-batches"}
        save("probes", result, page(result), args.out)
        print(f"{size} done", file=sys.stderr, flush=True)
    say(result, page(result), args.json)


def measured(size: str, args: Any) -> dict[str, Any]:
    """Return the times of one size: the step, each group of probes, and the mean cost per step."""
    device = torch.device(args.device)
    config = sized(size) if device.type == "cuda" else sized(size, dtype="float32")
    torch.manual_seed(0)
    with device:
        model = Transformer(config)
    train = TrainConfig(steps=100, sequences=args.sequences, micro_batches=args.micro_batches)
    trainer = Trainer(model, train)
    ids = torch.randint(config.vocab, (args.sequences, config.sequence + 1), device=device)
    batch = Batch(0, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), ("x",) * args.sequences)
    step = _times(lambda: trainer.step(batch), 3, args.steps, device)
    positions = max(1, PROBE_TOKENS // args.sequences)
    given = (ids[:, : min(positions, config.sequence)].contiguous(),)
    groups = {group: keys_of(group) for group in PROBES}
    everything = frozenset().union(*groups.values())
    probes = Probes(model, find_layout(model), RaisingGuard(), batch=given, by_domain=True)
    probes.run(everything)
    _shake(model)  # so that there are flips to look at
    alone = {}
    for group, metrics in groups.items():
        before = _memory(device)
        seconds = _times(partial(probes.run, metrics), 1, args.repeats, device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        alone[group] = {"ms": 1e3 * seconds, "memory_mb": (peak - before) / 1e6}
    cadence = Cadence.of()
    often, rarely = (cadence.due(s) & everything for s in (PROBE_EVERY, 0))
    every = {"often": _times(lambda: probes.run(often), 1, args.repeats, device)}
    every["all"] = _times(lambda: probes.run(rarely), 1, args.repeats, device)
    period = max(cadence.every[m] for m in rarely)
    rounds = period // PROBE_EVERY
    mean = ((rounds - 1) * every["often"] + every["all"]) / period
    return {
        "step_ms": 1e3 * step,
        "tokens": ids[:, 1:].numel(),
        "probe_tokens": given[0].numel(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": alone,
        f"every_{PROBE_EVERY}_ms": 1e3 * every["often"],
        f"every_{period}_ms": 1e3 * every["all"],
        "mean_ms": 1e3 * mean,
        "share": mean / step,
    }


def _times(work: Callable[[], Any], warm: int, timed: int, device: torch.device) -> float:
    """Return the median seconds of `work`."""
    seconds = []
    for i in range(warm + timed):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        if i >= warm:
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> int:
    """Return the bytes in use, and count the peak from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


@torch.no_grad()
def _shake(model: Transformer) -> None:
    for block in model.blocks:
        block.moe.router.weight.add_(
            0.1 * torch.randn_like(block.moe.router.weight) * block.moe.router.weight.std()
        )


def page(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    lines = ["# What the probes cost", "", f"`{result['command']}`. {where(result)}", ""]
    lines += [
        "| size | tokens a step | step | probes every 10th step | every 50th | mean a step | "
        "share |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    good = {size: r for size, r in result["sizes"].items() if "failed" not in r}
    for size, r in good.items():
        times = f"{r['every_10_ms']:.1f} ms | {r['every_50_ms']:.1f} ms | {r['mean_ms']:.2f} ms"
        lines.append(
            f"| {size} | {r['tokens']} | {r['step_ms']:.0f} ms | {times} | "
            f"{100 * r['share']:.2f} % |"
        )
    lines += [
        "",
        "Each group alone, in milliseconds (those but `spectra` and `growth` share one forward "
        "when together):",
        "",
    ]
    groups = list(PROBES)
    lines += ["| size | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for size, r in good.items():
        lines.append(
            f"| {size} | " + " | ".join(f"{r['groups'][g]['ms']:.1f}" for g in groups) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
