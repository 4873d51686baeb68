"""Names of the columns in the rows of statistics that the kernels write.

Each program of a kernel writes one row of partial results. A layout is the only place where the
order of the columns is written: device code and readers both ask it.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Reduction = Literal["sum", "max", "own"]
"""How the rows of several programs are combined; "own" is a value of one row alone."""


@dataclass(frozen=True)
class StatsLayout:
    """The columns of one row of statistics, in their order in memory."""

    columns: dict[str, Reduction]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.columns)

    @property
    def sums(self) -> tuple[str, ...]:
        return self._reduced_by("sum")

    @property
    def maxes(self) -> tuple[str, ...]:
        return self._reduced_by("max")

    def _reduced_by(self, reduction: Reduction) -> tuple[str, ...]:
        return tuple(name for name, how in self.columns.items() if how == reduction)

    def index(self, name: str) -> int:
        """Return the column of `name`."""
        return self.names.index(name)

    def named(self, rows: Tensor) -> dict[str, Tensor]:
        """Return each column of `rows` (…, W) under its name."""
        return {name: rows[..., i] for i, name in enumerate(self.names)}


MAPS_LAYOUT = StatsLayout(
    {
        "amax_gain_fwd": "sum",
        "amax_gain_bwd": "sum",
        "gain_fwd_min": "sum",
        "gain_bwd_min": "sum",
        "spectral_norm_res": "sum",
        "post_concentration": "sum",
        "amax_gain_fwd_max": "max",
        "amax_gain_bwd_max": "max",
        "spectral_norm_res_max": "max",
        "sinkhorn_residual": "max",
        "res_logit_max": "max",
        "res_logit_min_negated": "max",
        "worst_token": "own",
    }
)
"""Geometry of the residual maps, one row for each block of tokens. Sums are over tokens."""

STREAMS_LAYOUT = StatsLayout(
    {
        "amax": "max",
        "after": "sum",
        "branch": "sum",
        "mixed": "sum",
        "before": "sum",
    }
)
"""One row for each token and block of channels: the largest |X'|, then sums of squares of X',
H_postᵀ f, H_res X and X.
"""

COUNTS_LAYOUT = StatsLayout(
    {
        "clamp_gate_rate": "sum",
        "clamp_up_high_rate": "sum",
        "clamp_up_low_rate": "sum",
        "gate_amax": "max",
        "up_amax": "max",
        "act_amax": "max",
        "square": "sum",
        "elements": "sum",
    }
)
"""One row for each expert: clamp hits under the names of the rates they become when divided by
`elements`, largest magnitudes, the sum of squared products, and the number of elements.
"""
