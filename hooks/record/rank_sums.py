"""RankSums: values that need the sums over all ranks.

Expert loads are those of the whole batch, and the gradient norm of a layer whose weights are sharded
is the root of the sum of each rank's squares.
"""

import numpy as np

from geodiag.hooks.adapters.base import Layout
from geodiag.hooks.record.table_rows import Host

# L layers, R routers, E experts


class RankSums:
    """Packs a step's summands into one vector, and computes the step's values from the sums.

    The vector is [measured, gradient squares (L + 1), measured, tokens of each expert (R · E)].
    `measured` is 1 if this rank measured the group behind it: the sum is the number of ranks that
    did.
    """

    def __init__(self, layout: Layout) -> None:
        layers = len(layout.layers)
        routers = len(layout.routers)
        self._shape_RE = (routers, max((r.experts for r in layout.routers), default=0))
        self._squares = slice(1, layers + 2)
        self._counts = slice(layers + 3, layers + 3 + routers * self._shape_RE[1])
        self.size = self._counts.stop

    def summands(self, host: Host) -> np.ndarray:
        """Return this rank's vector; zeros where it measured nothing."""
        vector = np.zeros(self.size)
        if "grad_squares" in host:
            vector[self._squares.start - 1] = 1
            vector[self._squares] = host["grad_squares"]
        if "load" in host:
            vector[self._counts.start - 1] = 1
            vector[self._counts] = (host["load"] * host["tokens"]).ravel()
        return vector

    def estimate(self, host: Host, ranks: int) -> np.ndarray:
        """Return `summands`, and fill in `host` as if all `ranks` had measured the same.

        The estimate stays if the other ranks cannot be reached.
        """
        summands = self.summands(host)
        self.apply(host, summands * ranks, ranks)
        return summands

    def apply(self, host: Host, sums: np.ndarray, ranks: int) -> None:
        """Fill in `host` from the sums over `ranks`.

        If a rank did not measure a group, its values are not known and are left out.
        """
        if "grad_squares" in host:
            complete = sums[self._squares.start - 1] == ranks
            self._apply_gradients(host, sums[self._squares], complete)
        if "load" in host and ranks > 1:
            complete = sums[self._counts.start - 1] == ranks
            load_RE = sums[self._counts].reshape(self._shape_RE)
            if not complete:
                load_RE = np.full(self._shape_RE, np.nan)
            mean_R = load_RE.mean(-1)
            host["router/max_vio"] = (load_RE.max(-1) / mean_R - 1).astype(np.float32)
            host["router/load_cv"] = (load_RE.std(-1) / mean_R).astype(np.float32)

    def _apply_gradients(self, host: Host, squares: np.ndarray, complete: bool) -> None:
        before_clip = float(host["grad_total"][0])
        clip_known = not np.isnan(before_clip)
        if not complete:
            for name in ("layer/grad_norm", "grad_norm"):
                host.pop(name, None)
            if clip_known:
                host["grad_norm"] = np.array([before_clip], np.float32)
            return

        norms = np.sqrt(squares)
        total = np.sqrt(squares.sum())
        # The optimizer receives clipped gradients. If the trainer passed the norm before clipping,
        # each layer's norm is scaled back by the same factor. Infinity over infinity is NaN, and is
        # recorded as NaN.
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = before_clip / total if clip_known else 1.0
            host["layer/grad_norm"] = (norms[:-1] * scale).astype(np.float32)
        host["grad_norm"] = np.array([before_clip if clip_known else total], np.float32)
