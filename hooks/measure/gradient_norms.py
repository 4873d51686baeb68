"""Gradient norms a layer, read when the optimizer steps, so the user's order of `zero_grad` does
not matter.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.distributed.sharded_weights import local, replica_count
from geodiag.hooks.measure.forward_hooks import Report

_SETS = 64
"""Sets of parameters that are remembered; where idle experts have no gradients, the set is new at
every step.
"""


class GradientNorms:
    """Squared norms by layer; the last place holds what belongs to no layer.

    Of a gradient that is spread over ranks, this rank's share: nothing is asked of the others here.
    Shares are such that added up over all `ranks` they are the whole.
    """

    def __init__(
        self,
        layout: Layout,
        optimizers: Sequence[Optimizer],
        device: torch.device,
        report: Report,
        ranks: int = 1,
    ) -> None:
        self._device, self._ranks = device, ranks
        self._places: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._layer = {
            id(p): i for i, layer in enumerate(layout.layers) for p in layer.parameters()
        }
        self._outside = len(layout.layers)
        self._report, self._broken = report, False
        self.recording = True
        self._seen = False
        self._squares = torch.zeros(len(optimizers), self._outside + 1, device=device)
        self._handles: list[Removable] = []
        for i, o in enumerate(optimizers):
            self._handles.append(o.register_step_pre_hook(partial(self._before, i)))
            self._handles.append(o.register_step_post_hook(partial(self._after, i)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(
        self, place: int, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        if not _closure(args, kwargs):
            self._read(place, optimizer)

    def _after(self, place: int, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        """A closure computes the gradients inside of the step: before it there are those of the
        step before.
        """
        if _closure(args, kwargs):
            self._read(place, optimizer)

    @torch.no_grad()
    def _read(self, place: int, optimizer: Optimizer) -> None:
        if self._broken or not self.recording:
            return
        try:
            params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            if not params:  # an optimizer that idles says nothing
                return
            norms = torch.stack(torch._foreach_norm([local(p.grad) for p in params])).float()
            layers, shares = self._places_of(params)
            self._squares[place] = torch.zeros_like(self._squares[place]).index_add_(
                0, layers, norms.square() * shares
            )
            self._seen = True
        except Exception as e:  # monitoring must not end a training: said once, then silent here
            self._broken = True
            self._report("gradient norms", e)

    def _places_of(self, params: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Each parameter's layer and share, on the device; made once for each set of parameters
        with gradients.
        """
        key = tuple(id(p) for p in params)
        if key not in self._places:
            if len(self._places) >= _SETS:
                self._places.clear()
            layers = [self._layer.get(i, self._outside) for i in key]
            shares = [1 / replica_count(p, self._ranks) for p in params]
            self._places[key] = (
                torch.tensor(layers, device=self._device),
                torch.tensor(shares, device=self._device),
            )
        return self._places[key]

    def values(self, total: Tensor | None) -> dict[str, Tensor]:
        """This rank's shares, and the norm before clipping where the trainer knows it; NaN where
        not.
        """
        before = {
            "grad_total": self._squares.new_full((), torch.nan)
            if total is None
            else total.detach().float()
        }
        if not self._seen or self._broken:
            return before if total is None else before | {"grad_norm": before["grad_total"]}
        return before | {"grad_squares": self._squares.sum(0)}

    def clear(self) -> None:
        self._seen = False
        self._squares.zero_()


def _closure(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an optimizer's `step` was given one; `args` begins with the optimizer."""
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None


def optimizers_in(given: Any) -> list[Optimizer]:
    """One optimizer, several, or none, as a list. TypeError for anything else."""
    found = [given] if isinstance(given, Optimizer) else list(given or [])
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected torch.optim.Optimizer, got {type(optimizer).__name__}")
    return found
