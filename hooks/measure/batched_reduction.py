"""Batched reduction: what the hooks of one forward keep becomes buffer values, all places at once.

On a GPU measuring costs launches, not arithmetic: a few operations on the stacked tensors of all
places take the time of one place. Inside torch.compile and CUDA graphs nothing can be kept from one
place to the next, so there each place is reduced by itself.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Layout, StatsRows, WrittenView
from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.measure import experts, gains, routers, streams
from geodiag.hooks.measure.step_buffers import StepBuffers

# P places (sites, routers, …), S sites, T tokens, N streams, W columns


def can_keep() -> bool:
    """Return whether tensors may be kept until the forward ends: a compiled or captured graph does
    not run its Python again.
    """
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


class BatchedReduction:
    """Collects what hooks see (`add`) and writes it into the step's buffers (`finish`)."""

    def __init__(
        self,
        layout: Layout,
        buffers: StepBuffers,
        guard: FailureGuard,
        anticipatory: Callable[[], bool],
    ) -> None:
        """anticipatory: whether older weights choose this batch's experts."""
        self._layout = layout
        self._buffers = buffers
        self._guard = guard
        self._anticipatory = anticipatory
        self._kept: dict[str, dict[int, Any]] = {}
        """Kind → place → tensors. A place that is seen again replaces what it had."""
        self._writers: dict[str, tuple[str, Callable[[list[int], Any], None]]] = {
            "maps": ("residual maps", self._maps),  # before the streams, which need H_res
            "streams": ("streams", self._streams),
            "written": ("streams after the sites", self._written),
            "branch": ("block outputs", self._branch),
            "gradient": ("gradients", self._gradient),
            "router": ("routers", self._router),
            "experts": ("experts", self._experts),
        }
        """Kind → its name in reports, and what writes stacked places of it."""

    def add(self, kind: str, place: int, seen: tuple) -> None:
        """Keep what a hook saw at a place, or write it at once where nothing can be kept."""
        if can_keep():
            self._kept.setdefault(kind, {})[place] = seen
        else:
            self._writers[kind][1]([place], stacked([seen]))

    @torch.no_grad()
    def finish(self) -> None:
        """Write everything that was kept into this micro-batch's slot."""
        for kind, (name, write) in self._writers.items():
            seen = self._kept.pop(kind, None)
            if seen:
                self._guard.run(name, partial(self._write_all, kind, seen, write), retry=False)

    def discard(self) -> None:
        """Forget everything that was kept."""
        self._kept.clear()

    def _write_all(
        self, kind: str, seen: dict[int, Any], write: Callable[[list[int], Any], None]
    ) -> None:
        for places, together in alike(seen, partial(self._kind_of_place, kind)):
            write(places, together)

    def _kind_of_place(self, kind: str, place: int) -> Hashable:
        """Routers with another K, or a hash, are not stacked with the rest."""
        if kind != "router":
            return None
        return self._layout.routers[place].k, self._layout.routers[place].hashed

    # -- how each kind is written ------------------------------------------------------------

    def _maps(self, places: list[int], seen: gains.SiteMaps) -> None:
        self._put(places, gains.reduce(seen, self._buffers.index(seen.res_TNN.shape[1])))

    def _streams(self, places: list[int], seen: streams.StreamBatch) -> None:
        sites = [p for p in places if p < len(self._layout.sites)]
        identity = self._layout.streams == 1 or not sites
        maps = None if identity else self._buffers.written("res", sites)
        values, mixed = streams.reduce(seen, maps)
        self._put(places, values)
        if sites:
            mixed = mixed[: len(sites)]
            self._put(sites, {"mixed_norm": mixed})
            if identity:
                self._put(sites, {"post_norm": torch.ones_like(mixed)})

    def _written(self, places: list[int], seen: WrittenView) -> None:
        index = self._buffers.index(seen.stats.rows.shape[1])
        after_site, norms, of_site = streams.from_kernel(seen, index)
        self._put([p + 1 for p in places], after_site)
        self._put([*places, places[-1] + 1], {"stream_norm": norms})
        self._put(places, of_site)

    def _branch(self, places: list[int], seen: tuple[Tensor]) -> None:
        self._put(places, {"branch_norm": seen[0]})

    def _gradient(self, places: list[int], seen: tuple[Tensor]) -> None:
        self._put(places, {"grad_square": seen[0].square()})

    def _router(self, places: list[int], seen: routers.Routed) -> None:
        site = self._layout.routers[places[0]]
        index = self._buffers.index(seen.scores_TE.shape[1])
        anticipatory = self._anticipatory()
        self._put(places, routers.reduce(seen, site.k, site.hashed, anticipatory, index))

    def _experts(self, places: list[int], seen: tuple[StatsRows]) -> None:
        self._put(places, experts.reduce(seen[0]))

    def _put(self, places: list[int], values: dict[str, Tensor]) -> None:
        for name, value_P in values.items():
            self._buffers.put_all(name, value_P, places)


# -- stacking ----------------------------------------------------------------------------------


def alike(
    seen: dict[int, Any], kind_of_place: Callable[[int], Hashable]
) -> Iterator[tuple[list[int], Any]]:
    """Yield places with tensors of the same shapes and the same kind, and their tensors stacked.

    Not all places of a model need have the same number of experts, or expose the same tensors.
    """
    groups: dict[Hashable, list[int]] = {}
    for place in sorted(seen):
        groups.setdefault((_shapes(seen[place]), kind_of_place(place)), []).append(place)
    for places in groups.values():
        yield places, stacked([seen[p] for p in places])


def stacked(seen: Sequence[Any]) -> Any:
    """Return tuples of tensors as one tuple of stacked tensors; other fields are alike in all.

    Named tuples within the tuples are stacked in the same way.
    """
    fields = [_stacked_field(values) for values in zip(*seen, strict=True)]
    return type(seen[0])(*fields) if hasattr(seen[0], "_fields") else tuple(fields)


def _stacked_field(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    return stacked(values) if hasattr(values[0], "_fields") else values[0]


def _shapes(seen: tuple) -> Hashable:
    return tuple(_shape(value) for value in seen)


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    return _shapes(value) if hasattr(value, "_fields") else value
