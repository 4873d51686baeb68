"""Which defence addresses which stage, in the words of the table in README.md."""

from typing import Literal

from geodiag.run import Run

Stage = int | Literal["data"] | None

NAMES = {1: "local curvature", 2: "routing instability", 3: "amplification", "data": "the batch"}
"""Stage → what it is called."""

_DEFENCES = {
    1: "SwiGLU clamping",
    2: "anticipatory routing",
    3: "mHC: doubly stochastic residual maps",
    "data": "the batch: leave it out, or mix its domain in slowly",
}


def defence_for(stage: Stage, cause: str | None, part: str | None, mhc: bool) -> str | None:
    """What would have stopped a cascade that began so; None where nothing is known that fits.

    mhc: the residual maps are doubly stochastic already, so that what still grows is the block's
    own.
    """
    if cause == "lr":
        return "the learning rate: back to before that step, with a smoother schedule"
    if stage is None:
        return None
    if stage == 3 and part == "gradient":
        return "a clip of this layer's own gradient; mHC bounds only what is carried on"
    if stage == 3 and part == "write" and mhc:
        return "mHC is on and bounds the maps; this block's output wants a clamp"
    return _DEFENCES[stage]


def is_mhc(run: Run) -> bool:
    """Whether the run says that its residual maps are projected."""
    config = run.manifest.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    return isinstance(model, dict) and model.get("residual") == "mhc"
