"""Perturbation growth: what becomes, at the end of the model, of a small change of the stream that
enters a layer.

One forward for all layers: the batch is one piece of the probe, once untouched and once for each
layer. What it grows by is to be held against `spectral_norm_product`, what the residual maps alone
could make of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.failure_guard import FirstFailure
from geodiag.hooks.measure import formulas
from geodiag.hooks.measure.metric_group import MetricGroup
from geodiag.hooks.probes.batch import PROBE_TOKENS, ProbeBatch

# J copies, S positions, N streams, C channels

EPSILON = 2e-2
"""Length of the change, as a share of the token's stream; well above the last digit of bfloat16."""
_SEED = 23


GROWTH = MetricGroup("growth")


class PerturbationGrowth:
    """Hooks on the layers that are recorded; at work only inside `run`."""

    def __init__(self, batch: ProbeBatch, layout: Layout) -> None:
        self._batch = batch
        self._layers = [i for i in range(len(layout.layers)) if layout.watches(i)]
        self._count = len(layout.layers)
        self._on = False
        self._changes: list[Tensor] = []
        self._end: Tensor | None = None
        self._failures = FirstFailure()
        self._handles: list[Removable] = []
        if layout.watch_end is None:
            return
        for copy, layer in enumerate(self._layers, start=1):
            self._handles.append(
                layout.layers[layer].register_forward_pre_hook(
                    self._changing(copy, layer), with_kwargs=True
                )
            )
        self._handles += layout.watch_end(self._ended)

    def run(self) -> Tensor | None:
        """Return ‖change at the end‖ / ‖change at the layer‖ over the tokens, one value a layer.

        NaN for layers that are not recorded; None where the model's last stream is not known.
        """
        if not self._handles:
            return None
        copies = 1 + len(self._layers)
        self._on, self._changes, self._end = True, [], None
        try:
            self._batch.run_copies(copies, max(16, PROBE_TOKENS // copies))
            self._failures.raise_if_any()
            assert self._end is not None, "the end is watched"
            after = (self._end[1:] - self._end[:1]).flatten(1).norm(dim=1)
            growth = dict(zip(self._layers, after / torch.stack(self._changes), strict=True))
            return formulas.in_order(range(self._count), growth)
        finally:
            self._on, self._changes, self._end = False, [], None
            self._failures = FirstFailure()

    def _changing(self, copy: int, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if not self._on:
                return None
            return self._failures.run(lambda: self._changed(copy, layer, args, kwargs))

        return hook

    def _changed(
        self, copy: int, layer: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        place, name, x = _stream(args, kwargs)
        changed = x.clone()
        changed[copy] = _moved(x[copy], layer)
        self._changes.append(
            (changed[copy].float() - x[copy].float()).norm()
        )  # as it is after rounding
        if name is not None:
            return args, kwargs | {name: changed}
        return (*args[:place], changed, *args[place + 1 :]), kwargs

    def _ended(self, view: Callable[[], Tensor]) -> None:
        if self._on:
            self._end = self._failures.run(lambda: view().detach().float())
            self._batch.stop_forward()

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


@GROWTH.per_step("layers.perturbation_growth")
def perturbation_growth(probe: PerturbationGrowth) -> Tensor | None:
    return probe.run()


def _moved(x_S: Tensor, layer: int) -> Tensor:
    """Each token moved along a random direction of its own, the same ones every time."""
    generator = torch.Generator(x_S.device).manual_seed(_SEED + layer)
    drawn = torch.randn(x_S.shape, generator=generator, device=x_S.device)
    unit = drawn / drawn.flatten(1).norm(dim=1).view(-1, *[1] * (x_S.dim() - 1))
    length = EPSILON * x_S.float().flatten(1).norm(dim=1).view(-1, *[1] * (x_S.dim() - 1))
    return (x_S.float() + length * unit).to(x_S.dtype)


def _stream(args: tuple, kwargs: dict[str, Any]) -> tuple[int, str | None, Tensor]:
    """A block's hidden state among its arguments: the first floating-point tensor."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return place, None, value
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return 0, name, value
    raise TypeError("a block takes no floating-point tensor, so there is no stream to change")
