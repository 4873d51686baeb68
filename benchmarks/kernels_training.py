"""Benchmark of a training with Triton kernels against the same one with reference kernels.

    geodiag bench kernels_training [--size small] [--steps 200] [--sequences 2] [--device cuda]

Both begin with the same weights and train on the same batches. A third training shows the effect of
rounding alone: reference kernels, with every weight of the first layer's gates changed by one part
in 256, the last bit of bfloat16.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from geodiag.benchmarks.report import Parser, present, save, say, setting, where
from geodiag.reference_models.config import sized
from geodiag.reference_models.data import Loader
from geodiag.reference_models.text import open_corpus
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer

ARMS = ("triton", "reference", "reference, rounded otherwise")


def train(arm: str, size: str, steps: int, sequences: int, device: torch.device) -> dict[str, Any]:
    """Return the losses of one training, and its milliseconds per step."""
    kernels = arm.split(",")[0]
    torch.manual_seed(0)
    with device:
        model = Transformer(sized(size, "mhc", kernels=kernels, dtype="bfloat16"))
    if "otherwise" in arm:
        with torch.no_grad():
            model.blocks[0].moe.experts.gate_up.mul_(1 + 1 / 256)
    trainer = Trainer(model, TrainConfig(steps=steps, sequences=sequences))
    loader = Loader(open_corpus("stdlib"), sequences, model.config.sequence)
    batches = [loader.batch(step) for step in range(steps)]
    losses = []
    began = time.perf_counter()
    for batch in batches:
        losses.append(trainer.step(batch.to(device)).loss)
    found = torch.stack(losses).tolist()
    return {"losses": found, "ms_a_step": (time.perf_counter() - began) / steps * 1e3}


def apart(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Return the distance of two loss curves in nats per token."""
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    last = max(len(gaps) // 10, 1)
    ends = statistics.mean(a[-last:]) - statistics.mean(b[-last:])
    return {
        "mean": statistics.mean(gaps),
        "max": max(gaps),
        "first_step": gaps[0],
        "mean_of_the_last_tenth": ends,
    }


def run(
    size: str = "small",
    steps: int = 200,
    sequences: int = 2,
    device: str = "cuda",
    so_far: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Return every arm's losses and distance from the reference; call `so_far` after each arm."""
    result: dict[str, Any] = {
        "size": size,
        "steps": steps,
        "sequences": sequences,
        "arms": {},
        "apart": {},
    }
    for arm in ARMS:
        result["arms"][arm] = train(arm, size, steps, sequences, torch.device(device))
        arms = result["arms"]
        if "reference" in arms:
            reference = arms["reference"]["losses"]
            result["apart"] = {
                a: apart(v["losses"], reference) for a, v in arms.items() if a != "reference"
            }
        so_far(result)
    return result


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    r = result["result"]
    lines = [
        "# A training on Triton and on reference kernels",
        "",
        f"`{r['size']}`, bfloat16, {r['steps']} steps of {r['sequences']} sequences, same "
        "weights and batches.",
        where(result),
        "",
        "| against the reference kernels | mean difference, nats | largest | first step | mean "
        "of the last tenth |",
        "|---|---|---|---|---|",
    ]
    for arm, gap in r["apart"].items():
        numbers = " | ".join(
            f"{gap[k]:.4f}" for k in ("mean", "max", "first_step", "mean_of_the_last_tenth")
        )
        lines.append(f"| {arm} | {numbers} |")
    lines += ["", "| kernels | ms a step | loss, last tenth |", "|---|---|---|"]
    for arm, found in r["arms"].items():
        last = statistics.mean(found["losses"][-max(r["steps"] // 10, 1) :])
        lines.append(f"| {arm} | {found['ms_a_step']:.1f} | {last:.4f} |")
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("kernels_training", __doc__)
    parser.add_argument("--size", default="small")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    result = setting("kernels_training", argv, present(options.device))

    def keep(so_far: dict[str, Any]) -> None:
        result["result"] = so_far
        save("kernels_training", result, markdown(result), options.out)

    run(options.size, options.steps, options.sequences, options.device, keep)
    say(result, markdown(result), options.json)


if __name__ == "__main__":
    main()
