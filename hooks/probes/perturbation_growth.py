"""Perturbation growth: how much a small change of the stream at a layer's input grows to the end.

One forward measures all layers: its batch is one piece of the probe batch, copied once unchanged
and once for each layer with the stream changed at this layer. Compare the result with
`spectral_norm_product`, the growth that the residual maps alone could cause.
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

# S positions, N streams, C channels

EPSILON = 2e-2
"""Length of the change, relative to the token's stream; well above bfloat16's resolution of 2⁻⁸."""
_SEED = 23

GROWTH = MetricGroup("growth")


class PerturbationGrowth:
    """Hooks on the recorded layers; they act only inside `run`."""

    def __init__(self, batch: ProbeBatch, layout: Layout) -> None:
        self._batch = batch
        self._layers = [i for i in range(len(layout.layers)) if layout.watches(i)]
        self._count = len(layout.layers)
        self._running = False
        self._changes: list[Tensor] = []
        """Norm of the change at each layer."""
        self._end: Tensor | None = None
        """Streams after the last layer, one row per copy."""
        # On sharded weights a forward that has begun must end, so errors are raised after it.
        self._failures = FirstFailure()
        self._handles: list[Removable] = []
        if layout.watch_end is None:
            return
        for copy, layer in enumerate(self._layers, start=1):
            hook = self._change_hook(copy, layer)
            self._handles.append(
                layout.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
            )
        self._handles += layout.watch_end(self._keep_end)

    def run(self) -> Tensor | None:
        """Return ‖change at the end‖ / ‖change at the layer‖ over all tokens, one value per layer.

        NaN for layers that are not recorded; None if the end of the model's streams is unknown.
        """
        if not self._handles:
            return None
        copies = 1 + len(self._layers)
        self._running = True
        try:
            self._batch.run_copies(copies, max(16, PROBE_TOKENS // copies))
            self._failures.raise_if_any()
            assert self._end is not None, "the end is watched"

            # δ_L / δ_l = ‖F(x + δ) − F(x)‖ / ‖δ‖: row 0 holds the unchanged copy, and the other
            # rows one changed copy per layer.
            after = (self._end[1:] - self._end[:1]).flatten(1).norm(dim=1)
            growth = dict(zip(self._layers, after / torch.stack(self._changes), strict=True))
            return formulas.in_order(range(self._count), growth)
        finally:
            self._running = False
            self._changes = []
            self._end = None
            self._failures = FirstFailure()

    def _change_hook(self, copy: int, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if not self._running:
                return None
            return self._failures.run(lambda: self._changed(copy, layer, args, kwargs))

        return hook

    def _changed(
        self, copy: int, layer: int, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Return the layer's arguments with the stream changed in one copy."""
        index, name, x = _stream(args, kwargs)
        changed = x.clone()
        changed[copy] = _perturbed(x[copy], layer)
        # The norm of the change after rounding to the stream's dtype.
        self._changes.append((changed[copy].float() - x[copy].float()).norm())
        if name is not None:
            return args, kwargs | {name: changed}
        return (*args[:index], changed, *args[index + 1 :]), kwargs

    def _keep_end(self, view: Callable[[], Tensor]) -> None:
        if self._running:
            self._end = self._failures.run(lambda: view().detach().float())
            self._batch.stop_forward()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@GROWTH.per_step("layers.perturbation_growth")
def perturbation_growth(probe: PerturbationGrowth) -> Tensor | None:
    return probe.run()


def _perturbed(x_S: Tensor, layer: int) -> Tensor:
    """Move each token by EPSILON · ‖x‖ along its own random direction, the same in every probe."""
    generator = torch.Generator(x_S.device).manual_seed(_SEED + layer)
    drawn = torch.randn(x_S.shape, generator=generator, device=x_S.device)
    unit = drawn / _token_norms(drawn)
    return (x_S.float() + EPSILON * _token_norms(x_S.float()) * unit).to(x_S.dtype)


def _token_norms(x_S: Tensor) -> Tensor:
    """Return each token's norm, with dimensions of size 1 for the rest."""
    return x_S.flatten(1).norm(dim=1).view(-1, *[1] * (x_S.dim() - 1))


def _stream(args: tuple, kwargs: dict[str, Any]) -> tuple[int, str | None, Tensor]:
    """Return a block's hidden state, its first floating-point argument, by index or by name."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return index, None, value
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return 0, name, value
    raise TypeError("a block takes no floating-point tensor, so there is no stream to change")
