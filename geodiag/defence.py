"""Which defence addresses which stage, in the words of the table in README.md."""

from typing import Literal

Stage = int | Literal["data"] | None

NAMES = {1: "local curvature", 2: "chart inconsistency", 3: "amplification", "data": "the batch"}
"""Stage → what it is called."""

_DEFENCES = {
    1: "SwiGLU clamping",
    2: "anticipatory routing",
    3: "doubly stochastic residual maps (mHC)",
    "data": "leave out the batch, or mix its domain in slowly",
}


def defence_for(stage: Stage, *, cause: str | None = None, part: str | None = None, metric: str = "") -> str | None:
    """What would have stopped a cascade that began so; None where nothing is known that fits."""
    if cause == "lr":
        return "a smoother learning-rate schedule; go back to before the step in question"
    if stage is None:
        return None
    if stage == 3 and part == "gradient":
        return "clip this layer's gradient by itself, and go back to before it"
    return _DEFENCES[stage]
