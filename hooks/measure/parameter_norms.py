"""Sums of squares over the parameters of each layer, of each router and of each layer's experts.

Read when the optimizer steps, so that the order of the user's `zero_grad` does not matter. Squares
become norms on the host (parameter_metrics.py): of sharded weights each rank has only a share, and
only the sum over ranks is a norm.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geodiag.hooks import torch_internals
from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.distributed.sharded_weights import local, replica_count
from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.measure.parameter_metrics import PARAMETERS, QUANTITIES, Owners
from geodiag.hooks.measure.step_values import (
    GRADIENT_SQUARES,
    GRADIENT_TOTAL,
    UPDATE_SQUARES,
    WEIGHT_SQUARES,
    Values,
)

# Z optimizers, O owners

_SETS = 64
"""Sets of parameters that are remembered; where idle experts have no gradients, the set is new at
every step.
"""


class ParameterNorms:
    """Hooks on the optimizers; `values` once a step, then `prepare` for the next.

    Of sharded weights each rank sums its own share, without a collective. Shares are such that
    the sum over all `ranks` is the whole.
    """

    def __init__(
        self,
        layout: Layout,
        optimizers: Sequence[Optimizer],
        device: torch.device,
        guard: FailureGuard,
        ranks: int = 1,
    ) -> None:
        self._owners = Owners(layout)
        self._device = device
        self._guard = guard
        self._ranks = ranks
        self._gradients_due = True
        self._updates_due = False
        self._sums: dict[tuple[int, ...], _Sums] = {}
        self._squares_ZO = {
            quantity: torch.zeros(len(optimizers), self._owners.count, device=device)
            for quantity in QUANTITIES
        }
        self._measured: set[str] = set()
        """Quantities that this step measured."""
        self._before: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        """Optimizer → its parameters, and copies from before its step."""
        self._handles: list[Removable] = []
        for place, optimizer in enumerate(optimizers):
            before, after = partial(self._on_begin, place), partial(self._on_end, place)
            self._handles.append(optimizer.register_step_pre_hook(before))
            self._handles.append(optimizer.register_step_post_hook(after))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._before.clear()

    def prepare(self, due: frozenset[str]) -> None:
        """Forget the last step, and take up the metrics that are due at the next one."""
        self._gradients_due = "layers.grad_norm" in due
        self._updates_due = not due.isdisjoint(PARAMETERS.measured - {"layers.grad_norm"})
        for quantity in self._measured:
            self._squares_ZO[quantity].zero_()
        self._measured.clear()
        self._before.clear()

    def values(self, total: Tensor | None) -> Values:
        """Return this rank's sums, and the norm before clipping where the trainer reports it.

        total: the norm of all gradients before clipping; None if the trainer does not know it.
        """
        sums: Values = {q: self._squares_ZO[q].sum(0) for q in QUANTITIES if q in self._measured}
        if total is not None:
            sums[GRADIENT_TOTAL] = total.detach().float()
        return sums

    # -- hooks -------------------------------------------------------------------------------

    def _on_begin(
        self, place: int, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        if not _has_closure(args, kwargs):
            self._run("gradient norms", self._gradients_due, self._read_gradients, place, optimizer)
        self._run("update ratios", self._updates_due, self._copy_weights, place, optimizer)

    def _on_end(
        self, place: int, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        # A closure computes the gradients during the step: before it there are those of the step
        # before.
        if _has_closure(args, kwargs):
            self._run("gradient norms", self._gradients_due, self._read_gradients, place, optimizer)
        self._run("update ratios", self._updates_due, self._read_updates, place, optimizer)

    def _run(
        self,
        name: str,
        due: bool,
        work: Callable[[int, Optimizer], None],
        place: int,
        optimizer: Optimizer,
    ) -> None:
        if due:
            self._guard.run(name, partial(work, place, optimizer), retry=False)

    @torch.no_grad()
    def _read_gradients(self, place: int, optimizer: Optimizer) -> None:
        params = _with_gradients(optimizer)
        if params:
            self._add(place, GRADIENT_SQUARES, params, [local(p.grad) for p in params])

    @torch.no_grad()
    def _copy_weights(self, place: int, optimizer: Optimizer) -> None:
        params = _with_gradients(optimizer)
        self._before[place] = params, [_sample(p, s) for p, s in self._sampled(params)]

    @torch.no_grad()
    def _read_updates(self, place: int, optimizer: Optimizer) -> None:
        params, before = self._before.pop(place, ([], []))
        if not params:
            return
        after = [_sample(p, s) for p, s in self._sampled(params)]
        scale = [s for _, s in self._sampled(params)]
        self._add(place, WEIGHT_SQUARES, params, before, scale)
        self._add(place, UPDATE_SQUARES, params, torch_internals.subtract_all(after, before), scale)

    def _sampled(self, params: list[Tensor]) -> list[tuple[Tensor, int]]:
        """Return each parameter's local values and the stride of those that are compared."""
        return [(local(p), _stride(local(p))) for p in params]

    def _add(
        self,
        place: int,
        quantity: str,
        params: list[Tensor],
        values: list[Tensor],
        strides: list[int] | None = None,
    ) -> None:
        """Add up the squares of one tensor a parameter, by owner."""
        sums = self._sums_of(params)
        norms = torch.stack(torch_internals.norms(values)).float()
        squares = norms.square() * sums.shares
        if strides is not None:
            squares = squares * self._strides(params, strides)
        row_O = self._squares_ZO[quantity][place]
        row_O.zero_().index_add_(0, sums.owners, squares.index_select(0, sums.parameters))
        self._measured.add(quantity)

    def _strides(self, params: list[Tensor], strides: list[int]) -> Tensor:
        sums = self._sums_of(params)
        if sums.strides is None:
            sums.strides = torch.tensor(strides, dtype=torch.float32, device=self._device)
        return sums.strides

    def _sums_of(self, params: list[Tensor]) -> "_Sums":
        """Return how a set of parameters is summed; made once for each set with gradients."""
        key = tuple(id(p) for p in params)
        if key not in self._sums:
            if len(self._sums) >= _SETS:
                self._sums.clear()
            pairs = [(i, owner) for i, p in enumerate(key) for owner in self._owners.of(p)]
            shares = [1 / replica_count(p, self._ranks) for p in params]
            self._sums[key] = _Sums(
                torch.tensor([i for i, _ in pairs], device=self._device),
                torch.tensor([owner for _, owner in pairs], device=self._device),
                torch.tensor(shares, device=self._device),
            )
        return self._sums[key]


class _Sums:
    """For a set of parameters: pairs of a parameter and an owner, and each parameter's share."""

    def __init__(self, parameters: Tensor, owners: Tensor, shares: Tensor) -> None:
        self.parameters = parameters
        self.owners = owners
        self.shares = shares
        self.strides: Tensor | None = None


def _with_gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]


def _has_closure(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether `step` was called with a closure; `args` begins with the optimizer."""
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None


def optimizers_in(given: Any) -> list[Optimizer]:
    """Return one optimizer, several, or none, as a list. Raises TypeError for anything else."""
    found = [given] if isinstance(given, Optimizer) else list(given or [])
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected torch.optim.Optimizer, got {type(optimizer).__name__}")
    return found


_COMPARED = 1 << 18
"""Elements of one parameter that are copied before the step, at most: a copy of all weights would
double their memory. Evenly spread elements estimate both norms without bias.
"""


def _stride(values: Tensor) -> int:
    """Return the distance of compared elements: 1 up to `_COMPARED` elements, else odd and larger.

    The last dimensions of weights are multiples of large powers of two: an odd stride visits all
    columns, where an even one would come back to the same ones.
    """
    if values.numel() <= _COMPARED:
        return 1
    return -(-values.numel() // _COMPARED) | 1


def _sample(values: Tensor, stride: int) -> Tensor:
    """Return a copy of every `stride`-th element, in float32."""
    return values.detach().reshape(-1)[::stride].to(torch.float32, copy=True)
