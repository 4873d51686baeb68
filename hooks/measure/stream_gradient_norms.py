"""Norms of the streams' gradients, taken as the backward comes by: eager, compiled, or in a
captured CUDA graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from geodiag.hooks.measure.batched_reduction import Reduction, Report, keeps
from geodiag.hooks.measure.step_buffers import Slots, assign


class StreamGradients:
    """`watch` has the norm of a place's gradient written into the slots.

    A graph that is compiled gets a call that nobody looks into and that hooks the graph's own
    tensor whenever it runs. What comes into the graph from outside has its whole gradient only
    there: an ordinary hook, which torch.compile puts outside, sees that. On a graph's own tensors
    torch before 2.13 loses ordinary hooks, or trips over two of them that know the same buffer; so
    there they do nothing.
    """

    def __init__(self, slots: Slots, reduction: Reduction, report: Report) -> None:
        self._slots, self._reduction, self._report = slots, reduction, report
        self._broken = False

        def hooked(streams: Tensor, buffer: Tensor, current: Tensor, place: int) -> None:
            streams.register_hook(
                lambda grad: self._try(lambda: assign(buffer, current, place, _norm(grad).square()))
            )

        self._hooked = torch.compiler.allow_in_graph(hooked)

    def watch(self, place: int, streams: Tensor) -> None:
        """Hooks a tensor that was just computed."""
        with (
            torch.enable_grad()
        ):  # or torch before 2.13 takes the tensor for one without gradient from here on
            streams.register_hook(lambda grad: self._passes(place, grad))
        if torch.compiler.is_compiling():
            self._hooked(streams, self._slots.buffer("grad_square"), self._slots.current, place)

    def _passes(self, place: int, grad: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._try(lambda: self._saw(place, grad))

    def _saw(self, place: int, grad: Tensor) -> None:
        if keeps():
            self._reduction.saw("grad", place, (_norm(grad),))
        else:
            self._slots.put("grad_square", place, _norm(grad).square())

    def _try(self, write: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            write()
        except Exception as e:  # monitoring must not end a training: said once, then silent here
            self._broken = True
            self._report("gradients", e)


def _norm(grad: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad.detach(), dtype=torch.float32)
