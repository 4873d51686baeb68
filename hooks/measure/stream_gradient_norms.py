"""Norms of the streams' gradients, taken during the backward: eager, compiled, or captured in a
CUDA graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.measure.batched_reduction import BatchedReduction, can_keep
from geodiag.hooks.measure.step_buffers import StepBuffers, assign


class StreamGradientNorms:
    """`watch` has the norm of a place's gradient written into the buffers.

    Inside a compiled graph, a function that torch.compile does not trace hooks the graph's own
    tensor at every run. What enters the graph from outside has its whole gradient only there, and
    an ordinary hook, which torch.compile puts outside of the graph, reads it. On a graph's own
    tensors torch before 2.13 loses ordinary hooks, or fails on two hooks with the same buffer, so
    there the ordinary hooks do nothing.
    """

    def __init__(
        self, buffers: StepBuffers, reduction: BatchedReduction, guard: FailureGuard
    ) -> None:
        self._buffers = buffers
        self._reduction = reduction
        self._guard = guard

        def hooked(streams: Tensor, buffer: Tensor, current: Tensor, place: int) -> None:
            def write(grad: Tensor) -> None:
                self._try(lambda: assign(buffer, current, place, _norm(grad).square()))

            streams.register_hook(write)

        self._hooked = torch.compiler.allow_in_graph(hooked)

    def watch(self, place: int, streams: Tensor) -> None:
        """Hook a tensor that was just computed."""
        # Without enable_grad torch before 2.13 takes the tensor for one without gradient.
        with torch.enable_grad():
            streams.register_hook(lambda grad: self._on_gradient(place, grad))
        if torch.compiler.is_compiling():
            buffers = self._buffers
            self._hooked(streams, buffers.buffer("grad_square"), buffers.current, place)

    def _on_gradient(self, place: int, grad: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._try(lambda: self._write(place, grad))

    def _write(self, place: int, grad: Tensor) -> None:
        if can_keep():
            self._reduction.add("gradient", place, (_norm(grad),))
        else:
            self._buffers.put("grad_square", place, _norm(grad).square())

    def _try(self, write: Callable[[], None]) -> None:
        self._guard.run("gradients", write, retry=False)


def _norm(grad: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad.detach(), dtype=torch.float32)
