"""What only all ranks together know: loads of experts over the whole batch, gradient norms of
sharded weights.
"""

import numpy as np

from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.record.table_rows import Host

# L layers, R routers, E experts


class Sums:
    """Packs a step's summands for the exchange, and puts what comes of it into the step's host
    values.
    """

    def __init__(self, layout: Layout) -> None:
        layers, routers = len(layout.layers), len(layout.routers)
        self._shape_RE = (routers, max((r.experts for r in layout.routers), default=0))
        self._squares = slice(1, layers + 2)
        self._load = slice(layers + 3, layers + 3 + routers * self._shape_RE[1])

    @property
    def size(self) -> int:
        return self._load.stop

    def of(self, host: Host) -> np.ndarray:
        """This rank's summands, a 1 before each group that it measured."""
        out = np.zeros(self.size)
        if "grad_squares" in host:
            out[self._squares.start - 1], out[self._squares] = 1, host["grad_squares"]
        if "load" in host:
            out[self._load.start - 1], out[self._load] = 1, (host["load"] * host["tokens"]).ravel()
        return out

    def estimated(self, host: Host, ranks: int) -> np.ndarray:
        """`of`; and until the others were heard, the host values are as if they had measured the
        same.
        """
        sums = self.of(host)
        self.into(host, sums * ranks, ranks)
        return sums

    def into(self, host: Host, sums: np.ndarray, ranks: int) -> None:
        """Norms and loads of all `ranks`, in place of what this rank alone could say; nothing where
        one is missing.
        """
        if "grad_squares" in host:
            self._gradients(
                host, sums[self._squares], all_there=sums[self._squares.start - 1] == ranks
            )
        if "load" in host and ranks > 1:
            known = sums[self._load.start - 1] == ranks
            load_RE = (
                sums[self._load].reshape(self._shape_RE)
                if known
                else np.full(self._shape_RE, np.nan)
            )
            mean = load_RE.mean(-1)
            host["router/max_vio"] = (load_RE.max(-1) / mean - 1).astype(np.float32)
            host["router/load_cv"] = (load_RE.std(-1) / mean).astype(np.float32)

    def _gradients(self, host: Host, squares: np.ndarray, all_there: bool) -> None:
        before = float(host["grad_total"][0])
        known = not np.isnan(before)
        if not all_there:
            for name in ("layer/grad_norm", "grad_norm"):
                host.pop(name, None)
            if known:
                host["grad_norm"] = np.array([before], np.float32)
            return
        norms, total = np.sqrt(squares), np.sqrt(squares.sum())
        # The optimizer sees clipped gradients; a trainer that knows the norm before says it: back
        # by that factor. An infinite norm over another is a NaN, and is recorded so.
        with np.errstate(invalid="ignore", divide="ignore"):
            host["layer/grad_norm"] = (norms[:-1] * (before / total if known else 1.0)).astype(
                np.float32
            )
        host["grad_norm"] = np.array([before if known else total], np.float32)
