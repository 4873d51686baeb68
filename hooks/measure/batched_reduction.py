"""From what the taps saw to the slots: all places of a kind at once where it can be kept so long,
else one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Layout, WrittenView
from geodiag.hooks.measure import reduce as measure
from geodiag.hooks.measure.pending_tensors import Pending, alike, stacked
from geodiag.hooks.measure.step_buffers import Slots

Report = Callable[[str, Exception], None]


def keeps() -> bool:
    """Whether what a hook sees can be kept for later: neither a compiled nor a captured graph runs
    its Python again.
    """
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


class Reduction:
    """`saw` what a place shows, `finish` when the forward is over."""

    def __init__(
        self, layout: Layout, slots: Slots, report: Report, replaying: Callable[[], bool]
    ) -> None:
        self._layout, self._slots, self._report, self._replaying = layout, slots, report, replaying
        self._pending = Pending()
        self._broken: set[str] = set()
        self._ways: dict[str, tuple[str, Callable[[list[int], Any], None]]] = {
            "maps": ("residual maps", self._maps),
            "stream": ("streams", self._stream),
            "written": ("streams after the sites", self._written),
            "branch": (
                "block outputs",
                lambda places, seen: self._put(places, {"branch_norm": seen[0]}),
            ),
            "grad": (
                "gradients",
                lambda places, seen: self._put(places, {"grad_square": seen[0].square()}),
            ),
            "router": ("routers", self._router),
            "act": ("experts", lambda places, seen: self._put(places, measure.experts(seen[0]))),
        }
        """Kind → what a person calls it, and how stacked places of it are written, in this order.
        """

    def saw(self, kind: str, place: int, seen: tuple) -> None:
        """Keeps what a place shows; where nothing can be kept, writes it there and then."""
        if keeps():
            self._pending.add(kind, place, seen)
        else:
            self._ways[kind][1]([place], stacked([seen]))

    @torch.no_grad()
    def finish(self) -> None:
        """Writes what was kept into this micro-batch's slot."""
        for kind, (said, write) in self._ways.items():
            seen = self._pending.take(kind)
            if not seen or kind in self._broken:
                continue
            try:
                for places, together in alike(seen, self._apart(kind)):
                    write(places, together)
            except (
                Exception
            ) as e:  # monitoring must not end a training: said once, then silent here
                self._broken.add(kind)
                self._report(said, e)

    def forget(self) -> None:
        """Drops what was kept."""
        self._pending.clear()

    def _apart(self, kind: str) -> Callable[[int], Any]:
        """What keeps two places apart, beside their shapes."""
        routers = self._layout.routers
        return (
            (lambda i: (routers[i].k, routers[i].hashed)) if kind == "router" else (lambda _: None)
        )

    # -- how each kind is written ------------------------------------------------------------

    def _maps(self, places: list[int], seen: measure.Maps) -> None:
        self._put(places, measure.maps(seen, self._slots.index(seen.res_TNN.shape[1])))

    def _stream(self, places: list[int], seen: measure.Stream) -> None:
        sites = [p for p in places if p < len(self._layout.sites)]
        identity = self._layout.streams == 1 or not sites
        values = measure.streams(seen, None if identity else self._slots.written("res", sites))
        mixed = values.pop("mixed_norm")[: len(sites)]
        self._put(places, values)
        if sites:
            self._put(
                sites,
                {"mixed_norm": mixed} | ({"post_norm": torch.ones_like(mixed)} if identity else {}),
            )

    def _written(self, places: list[int], seen: WrittenView) -> None:
        values = measure.written(
            seen.stats, seen.elements, self._slots.index(seen.stats.rows.shape[1])
        )
        self._put(
            [p + 1 for p in places], {n: values.pop(n) for n in ("stream_sums", "stream_maxes")}
        )
        self._put([*places, places[-1] + 1], {"stream_norm": values.pop("stream_norm")})
        self._put(places, values)

    def _router(self, places: list[int], seen: measure.Routed) -> None:
        site, index = self._layout.routers[places[0]], self._slots.index(seen.scores_TE.shape[1])
        self._put(places, measure.routers(seen, site.k, site.hashed, self._replaying(), index))

    def _put(self, places: list[int], values: dict[str, Tensor]) -> None:
        for name, value_P in values.items():
            self._slots.put_all(name, value_P, places)
