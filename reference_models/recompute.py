"""Recomputation of hyper-connections in the backward (arXiv 2512.24880 §4.3.2).

For a block of layers, only the first streams and the output of each attention and experts module
are kept. Everything else that connections and norms need in the backward is computed from these
again, by running the light parts alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from geodiag.reference_models.kernels.reference import Mix, Projected, Written


def block_length(streams: int, layers: int) -> int:
    """Return the layers of a block, √(nL/(n+2)) (arXiv 2512.24880 §4.3.2).

    It balances what is kept against what one block's backward computes again.
    """
    return max(1, round((streams * layers / (streams + 2)) ** 0.5))


class Kept:
    """A site's light parts, with everything kept for the backward."""

    def before(
        self, connection: nn.Module, norm: nn.Module, x_BSNC: Tensor, projected: Projected | None
    ) -> tuple[Mix, Tensor]:
        """Return the maps, and the normalised input of the site's attention or experts."""
        mix = connection(x_BSNC, projected)
        return mix, norm(mix.inner_TC)

    def inside(self, heavy: Callable[..., Any], hidden_BSC: Tensor, *more: Tensor) -> Any:
        """Run the attention or the experts."""
        return heavy(hidden_BSC, *more)

    def after(
        self,
        connection: nn.Module,
        x_BSNC: Tensor,
        branch_BSC: Tensor,
        mix: Mix,
        next_phi: Tensor | None,
    ) -> Written:
        """Return the streams after the site."""
        return connection.write(x_BSNC, branch_BSC, mix, next_phi)  # type: ignore[operator]


KEPT = Kept()


class _Site(NamedTuple):
    connection: nn.Module
    norm: nn.Module
    branch_BSC: Tensor
    next_phi: Tensor | None


class _Saved(NamedTuple):
    """Placeholder in the graph for a tensor that was not kept."""

    site: int
    number: int


class _Hidden(NamedTuple):
    """Placeholder in the graph for a view of a site's normalised input."""

    site: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Recomputed(Kept):
    """One block of layers in one forward, without its tensors.

    All of them are computed again when the backward unpacks the first.
    """

    def __init__(self, x_BSNC: Tensor, projected: Projected | None) -> None:
        self._first = x_BSNC.detach()
        self._sums = None if projected is None else projected.sums_STK
        self._sites: list[_Site] = []
        self._norm: nn.Module
        """The norm of the site between its `before` and `after`."""
        self._numbers: list[int] = []
        """Number of tensors that each site has saved so far."""
        self._before: list[int] = []
        """How many of these were saved before its attention or experts."""
        self._again: dict[tuple[int, int], Tensor] = {}
        self._hidden: dict[int, Tensor] = {}

    def before(
        self, connection: nn.Module, norm: nn.Module, x_BSNC: Tensor, projected: Projected | None
    ) -> tuple[Mix, Tensor]:
        self._numbers.append(0)
        self._norm = norm
        with saved_tensors_hooks(self._forget, self._recall):
            made = super().before(connection, norm, x_BSNC, projected)
        self._before.append(self._numbers[-1])
        return made

    def inside(self, heavy: Callable[..., Any], hidden_BSC: Tensor, *more: Tensor) -> Any:
        site = len(self._numbers) - 1
        where = hidden_BSC.untyped_storage().data_ptr()
        dtype = hidden_BSC.dtype

        def forget(saved: Tensor) -> Tensor | _Hidden:
            if saved.dtype != dtype or saved.untyped_storage().data_ptr() != where:
                return saved
            return _Hidden(site, saved.shape, saved.stride(), int(saved.storage_offset()))

        with saved_tensors_hooks(forget, self._recall_hidden):
            return super().inside(heavy, hidden_BSC, *more)

    def after(
        self,
        connection: nn.Module,
        x_BSNC: Tensor,
        branch_BSC: Tensor,
        mix: Mix,
        next_phi: Tensor | None,
    ) -> Written:
        self._sites.append(_Site(connection, self._norm, branch_BSC.detach(), next_phi))
        with saved_tensors_hooks(self._forget, self._recall):
            return super().after(connection, x_BSNC, branch_BSC, mix, next_phi)

    def _forget(self, _: Tensor) -> _Saved:
        site = len(self._numbers) - 1
        self._numbers[site] += 1
        return _Saved(site, self._numbers[site])

    def _recall(self, saved: _Saved) -> Tensor:
        if saved not in self._again:
            self._replay()
        if saved.number <= self._before[saved.site]:
            # The backward of the norm needs the gradient of its output, so the modules that used
            # the normalised input have finished, and the input is free.
            self._hidden.pop(saved.site, None)
        return self._again.pop(saved)

    def _recall_hidden(self, saved: Tensor | _Hidden) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.site not in self._hidden:
            self._replay()
        return self._hidden[saved.site].as_strided(saved.size, saved.stride, saved.offset)

    def _replay(self) -> None:
        """Run the light parts of all sites again; they save the same tensors in the same order."""
        again: dict[tuple[int, int], Tensor] = {}
        x, sums = self._first, self._sums
        for i, site in enumerate(self._sites):
            number = 0

            def keep(saved: Tensor, i: int = i) -> None:
                nonlocal number
                number += 1
                again[i, number] = saved.detach()

            x, branch = x.requires_grad_(), site.branch_BSC.requires_grad_()
            projected = None if sums is None else Projected(x, sums)
            with torch.enable_grad(), saved_tensors_hooks(keep, _gone):
                mix, hidden = Kept.before(self, site.connection, site.norm, x, projected)
                self._hidden[i] = hidden.detach()
                written = Kept.after(self, site.connection, x, branch, mix, site.next_phi)
            x = written.streams_TNC.detach()
            sums = None if written.projected is None else written.projected.sums_STK
        self._again = again


def _gone(_: object) -> Tensor:
    raise RuntimeError("a replayed graph is not differentiated")
