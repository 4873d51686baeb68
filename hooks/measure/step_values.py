"""Values of one step, from the hooks to the rows: named by the registry, checked in one place."""

from collections.abc import Iterable, Set

from torch import Tensor

from geodiag.metrics.registry import BY_KEY, MATRICES

Values = dict[str, Tensor]
"""Key → values of all places. A key is a metric's `table.name`, or one of `NOT_METRICS`."""

EXPERT_ELEMENTS = "expert elements"
"""(L, E) activations that each routed expert computed; 0: no token reached the expert."""
GRADIENT_TOTAL = "gradient norm of the trainer"
"""0-d, before clipping; NaN where the trainer does not report it."""
GRADIENT_SQUARES = "gradient squares"
"""(O,) sums of squares of this rank, one a layer, router, …: see parameter_norms.py."""
UPDATE_SQUARES = "update squares"
WEIGHT_SQUARES = "weight squares"
TRACED_TOKENS = "traced tokens"
"""(T,) places of the traced tokens in the probe batch."""
TRACED_IDS = "traced token ids"
"""(T,) their ids in the vocabulary."""
TRACED_EXPERTS = "traced experts"
"""(R, T, K) their experts, heaviest first; NaN where a router was not probed."""

NOT_METRICS = frozenset(
    {
        MATRICES,
        EXPERT_ELEMENTS,
        GRADIENT_TOTAL,
        GRADIENT_SQUARES,
        UPDATE_SQUARES,
        WEIGHT_SQUARES,
        TRACED_TOKENS,
        TRACED_IDS,
        TRACED_EXPERTS,
    }
)
"""Inputs of rows that are no metrics themselves."""


def unregistered(keys: Iterable[str]) -> list[str]:
    """Return the keys that are neither registered metrics nor in `NOT_METRICS`."""
    return [key for key in keys if key not in BY_KEY and key not in NOT_METRICS]


def due_only(values: Values, due: Set[str]) -> Values:
    """Return the values that are recorded at this step. Values without a cadence always are."""
    return {key: v for key, v in values.items() if not _has_cadence(key) or key in due}


def _has_cadence(key: str) -> bool:
    return key == MATRICES or (key in BY_KEY and BY_KEY[key].table != "steps")
