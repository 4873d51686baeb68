"""Gradient norms a layer, read when the optimizer steps, so the user's order of `zero_grad` does not matter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.taps import Report


class GradientNorms:
    """Squared norms by layer; the last place holds what belongs to no layer."""

    def __init__(self, layout: Layout, optimizers: Sequence[Optimizer], device: torch.device, report: Report) -> None:
        self._device = device
        self._index: dict[tuple[int, ...], Tensor] = {}
        self._layer = {id(p): i for i, layer in enumerate(layout.layers) for p in layer.parameters()}
        self._outside = len(layout.layers)
        self._report, self._broken = report, False
        self.recording = True
        self._squares = torch.zeros(len(optimizers), self._outside + 1, device=device)
        self._handles: list[Removable] = [
            o.register_step_pre_hook(lambda opt, *_, i=i: self._read(i, opt)) for i, o in enumerate(optimizers)
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _read(self, place: int, optimizer: Optimizer) -> None:
        if self._broken or not self.recording:
            return
        try:
            params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            norms = torch.stack(torch._foreach_norm([p.grad for p in params])).float()
            squares = torch.zeros_like(self._squares[place]).index_add_(0, self._layers_of(params), norms.square())
            self._squares[place] = squares
        except Exception as e:  # monitoring must not end a training: said once, then silent here
            self._broken = True
            self._report("gradient norms", e)

    def _layers_of(self, params: list[Tensor]) -> Tensor:
        """Each parameter's layer, on the device; made once for each set of parameters that has gradients."""
        key = tuple(id(p) for p in params)
        if key not in self._index:
            layers = [self._layer.get(i, self._outside) for i in key]
            self._index[key] = torch.tensor(layers, device=self._device)
        return self._index[key]

    def values(self, total: Tensor | None) -> dict[str, Tensor]:
        """Norm of each layer and of everything.

        `total`, where the trainer knows it, is the norm before clipping; the layers are scaled back by the same factor.
        """
        squares = self._squares.sum(0)
        seen = squares.sum().sqrt()
        norms = squares[: self._outside].sqrt()
        if total is None:
            return {"layer/grad_norm": norms, "grad_norm": seen}
        total = total.detach().to(norms.device).float()
        return {"layer/grad_norm": norms * (total / seen), "grad_norm": total}

    def clear(self) -> None:
        self._squares.zero_()


def optimizers_in(given: Any) -> list[Optimizer]:
    """One optimizer, several, or none, as a list. TypeError for anything else."""
    found = [given] if isinstance(given, Optimizer) else list(given or [])
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected torch.optim.Optimizer, got {type(optimizer).__name__}")
    return found
