"""The trials of `geodiag bench cascade`: which faults are planted where, and their trainings."""

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geodiag.cli.train_options import Size
    from geodiag.reference_models.config import Residual

EARLIEST = 90
LATEST = 120
"""Between these steps a fault is planted: after the steep descent, with a past to stand out from.
"""
STEPS = 170
GROWN_STEPS = 220
"""Where a fault grows, which it does until the end."""
CLEAN_STEPS = 1000
"""Length of the trainings that only count false alarms."""


@dataclass(frozen=True)
class Truth:
    """What a kind of fault breaks first, fixed before the first measurement, and its magnitude."""

    stage: int | str | None
    """1, 2, 3, "data", or None for a learning rate, which breaks every layer at once."""
    weakest: float | None = None
    strongest: float | None = None
    layered: bool = True
    clamp: float | None = 10.0
    """Limit of the activations, None for none: what it catches cannot grow."""


TRUTHS = {
    "expert-scale": Truth(1, 10, 1000),
    "bit-flip": Truth(1, -2, -2),
    "gate-column": Truth(2, 10, 1000),
    "router-shift": Truth(2, 2, 100),
    "router-permute": Truth(2),
    "bias-kick": Truth(2, 0.5, 20),
    "residual-expand": Truth(3, 1.3, 5),
    "block-scale": Truth(3, 10, 300),
    "grad-scale": Truth(3, 30, 3000),
    "far-batch": Truth("data", layered=False),
    "lr-shock": Truth(None, 10, 50, layered=False),
    "growing expert-scale": Truth(1, 1.5, 2, clamp=None),
    "growing gate-column": Truth(2, 1.5, 2),
    "growing router-shift": Truth(2, 0.5, 2),
    "growing residual-expand": Truth(3, 1.2, 1.5),
    "growing block-scale": Truth(3, 1.5, 2),
    "growing lr-shock": Truth(None, 1.07, 1.12, layered=False),
}
"""Every kind of fault, abrupt; and those that can grow, by a factor a step that was chosen on other
seeds.
"""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training: a seed, and one fault or none."""

    seed: int
    residual: "Residual"
    size: "Size"
    steps: int
    kind: str | None = None
    step: int | None = None
    layer: int | None = None
    magnitude: float | None = None

    @property
    def name(self) -> str:
        what = (self.kind or f"clean {self.steps}").replace(" ", "-")
        return f"{self.residual}-{self.seed}-{what}"

    @property
    def twin(self) -> str:
        """Name of the same training without a fault."""
        return f"{self.residual}-{self.seed}-clean-{self.steps}"

    @property
    def faults(self) -> tuple[str, ...]:
        """The fault as `--inject` takes it."""
        if self.kind is None or self.step is None:
            return ()
        kind = self.kind.removeprefix("growing ")
        until = "" if kind == self.kind else f"-{self.steps - 1}"
        where = "" if self.layer is None else f":{self.layer}"
        size = "" if self.magnitude is None else f"={self.magnitude:g}"
        return (f"{kind}@{self.step}{until}{where}{size}",)


def plan(
    seeds: Sequence[int],
    residuals: Sequence["Residual"],
    size: "Size",
    kinds: Sequence[str],
    clean: int,
) -> list[Trial]:
    """Return the trials: every kind of fault once per seed and residual, and their twins.

    Step, layer and magnitude are drawn from the seed. `clean` more trainings of `CLEAN_STEPS` steps
    without a fault use the seeds after those.
    """
    from geodiag.reference_models.config import SIZES

    config = SIZES[size]
    trials = []
    for residual in residuals:
        for seed in seeds:
            base: dict[str, Any] = {"seed": seed, "residual": residual, "size": size}
            lengths = {k: GROWN_STEPS if k.startswith("growing ") else STEPS for k in kinds}
            trials += [Trial(**base, steps=steps) for steps in sorted(set(lengths.values()))]
            for kind in kinds:
                rng = random.Random(f"{kind} {residual} {seed}")
                truth = TRUTHS[kind]
                step = rng.randint(EARLIEST, LATEST)
                first = config.hash_layers if truth.stage == 2 else 0
                layer = rng.randrange(first, config.layers) if truth.layered else None
                drawn: dict[str, Any] = {
                    "step": step,
                    "layer": layer,
                    "magnitude": _drawn(rng, truth),
                }
                trials.append(Trial(**base, steps=lengths[kind], kind=kind, **drawn))
    after = max(seeds) + 1
    trials += [
        Trial(seed=after + i, residual=residuals[i % len(residuals)], size=size, steps=CLEAN_STEPS)
        for i in range(clean)
    ]
    return trials


def _drawn(rng: random.Random, truth: Truth) -> float | None:
    if truth.weakest is None or truth.strongest is None:
        return None
    if truth.weakest == truth.strongest:
        return truth.weakest
    return float(f"{math.exp(rng.uniform(math.log(truth.weakest), math.log(truth.strongest))):.4g}")


def train(trial: Trial, folder: Path, sequences: int, device: str) -> None:
    """Train one trial into `folder` under its name, unless it exists."""
    home = folder / trial.name
    rough = folder / f"{trial.name}.unfinished"
    if home.exists():
        return
    import torch

    from geodiag.cli.train_options import Options
    from geodiag.cli.training import Training

    torch.set_num_threads(1)
    shutil.rmtree(rough, ignore_errors=True)
    options = Options(
        residual=trial.residual,
        size=trial.size,
        steps=trial.steps,
        seed=trial.seed,
        device=device,
        sequences=sequences,
        inject=trial.faults,
        clamp=10.0 if trial.kind is None else TRUTHS[trial.kind].clamp,
        run=rough,
    )
    training = Training(options, quiet=True)
    try:
        for _ in training.steps():
            pass
    finally:
        training.close()
    rough.rename(home)
