"""Sums over ranks: loads of experts over the whole batch, parameter norms of sharded weights.

A rank sees only its own tokens, and of sharded weights only its own share. What is not a mean or a
maximum of the ranks' values is computed here from sums that the ranks exchange once a step.
"""

import numpy as np

from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.measure.parameter_metrics import (
    PARAMETERS,
    QUANTITIES,
    Owners,
    ParameterTotals,
)
from geodiag.hooks.measure.step_values import GRADIENT_SQUARES, GRADIENT_TOTAL
from geodiag.hooks.record.table_rows import Host

# L layers, R routers, E experts, O owners of parameters


class RankSums:
    """Packs what one rank adds to the sums, and computes metrics from the sums of all ranks.

    Each group of summands has a 1 before it: the sum of these is the number of ranks that measured
    the group.
    """

    def __init__(self, layout: Layout) -> None:
        self._owners = Owners(layout)
        routers = len(layout.routers)
        self._shape_RE = routers, max((r.experts for r in layout.routers), default=0)
        width = 1 + self._owners.count
        self._squares = {
            quantity: slice(1 + i * width, (i + 1) * width) for i, quantity in enumerate(QUANTITIES)
        }
        first = 1 + len(QUANTITIES) * width
        self._load = slice(first, first + routers * self._shape_RE[1])

    @property
    def size(self) -> int:
        """Number of summands of one rank."""
        return self._load.stop

    def of(self, host: Host) -> np.ndarray:
        """Return this rank's summands."""
        out = np.zeros(self.size)
        for quantity, at in self._squares.items():
            if quantity in host:
                out[at.start - 1] = 1
                out[at] = host[quantity]
        if "experts.load" in host:
            out[self._load.start - 1] = 1
            out[self._load] = (host["experts.load"] * host["steps.tokens"]).ravel()
        return out

    def estimate(self, host: Host, ranks: int) -> np.ndarray:
        """Return `of`, and compute the metrics as if all ranks had measured the same.

        The scores of this rank need values before the other ranks' messages arrive.
        """
        sums = self.of(host)
        self.apply(host, sums * ranks, ranks)
        return sums

    def apply(self, host: Host, sums: np.ndarray, ranks: int) -> None:
        """Put the metrics of all `ranks` into `host`. A metric that some rank lacks is left out."""
        self._parameter_norms(host, sums, ranks)
        if "experts.load" in host and ranks > 1:
            known = sums[self._load.start - 1] == ranks
            load_RE = np.full(self._shape_RE, np.nan)
            if known:
                load_RE = sums[self._load].reshape(self._shape_RE)
            mean_R = load_RE.mean(-1)
            host["layers.max_vio"] = (load_RE.max(-1) / mean_R - 1).astype(np.float32)
            host["layers.load_cv"] = (load_RE.std(-1) / mean_R).astype(np.float32)

    def _parameter_norms(self, host: Host, sums: np.ndarray, ranks: int) -> None:
        for key in (*PARAMETERS.measured, "steps.grad_norm"):
            host.pop(key, None)
        squares = {
            quantity: sums[at]
            for quantity, at in self._squares.items()
            if quantity in host and sums[at.start - 1] == ranks
        }
        before = float(host[GRADIENT_TOTAL][0]) if GRADIENT_TOTAL in host else None
        total = None
        # An infinite norm over another one is NaN, and is recorded so.
        with np.errstate(invalid="ignore", divide="ignore"):
            if GRADIENT_SQUARES in squares:
                of_modules = squares[GRADIENT_SQUARES][: self._owners.layers + 1]
                total = float(np.sqrt(of_modules.sum()))
            # The optimizer receives clipped gradients: scaled back by the trainer's own norm.
            clip = 1.0 if before is None or total is None else before / np.float64(total)
            found = PARAMETERS.step_values(ParameterTotals(squares, self._owners, clip))
        host |= {key: np.ma.asarray(value, np.float32) for key, value in found.items()}
        norm = before if before is not None else total
        if norm is not None:
            host["steps.grad_norm"] = np.array([norm], np.float32)
