"""Suggested fixes: the defence against each stage, as in the table of README.md."""

from typing import Literal

from geodiag.run import Run

Stage = int | Literal["data"] | None

NAMES = {
    1: "local curvature",
    2: "routing instability",
    3: "amplification",
    "data": "the batch",
}
"""Stage → its name."""

_DEFENCES = {
    1: "SwiGLU clamping",
    2: "anticipatory routing",
    3: "mHC: doubly stochastic residual maps",
    "data": "skip this batch, or mix its domain in slowly",
}


def defence_for(stage: Stage, cause: str | None, part: str | None, mhc: bool) -> str | None:
    """Return the defence that fits the origin of a cascade; None if none is known.

    mhc: True if the residual maps are doubly stochastic already. Growth in a block's output then
    comes from the block itself.
    """
    if cause == "lr":
        return "return to the learning rate before that step, with a smoother schedule"
    if stage is None:
        return None
    if stage == 3 and part == "gradient":
        return "clipping of this layer's gradient (mHC bounds only the residual maps)"
    if stage == 3 and part == "write" and mhc:
        return "clamping of this block's output (mHC is on and bounds the residual maps already)"
    return _DEFENCES[stage]


def is_mhc(run: Run) -> bool:
    """Return True if the run's configuration has projected residual maps."""
    config = run.manifest.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    return isinstance(model, dict) and model.get("residual") == "mhc"
