"""BackwardListener: the loss of an unedited script, from the backwards that it runs.

A step's loss is the sum of the scalars on which backward was called since the last step, which is
what the optimizer descends. With gradient accumulation these are the losses of the micro-batches as
they were differentiated: their sum is the mean if the script divides each by their number. The
factor of a GradScaler is taken out. No value is read on the host.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from geodiag.hooks import torch_internals

Run = Callable[[Callable[[], None]], None]
"""Runs a callback so that no error of it reaches the training."""


class StepLosses:
    """`add` each differentiated loss; `take` the sum once a step."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._discarded: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        if self._sum is None:
            self._sum = loss
        else:
            self._sum = self._sum + loss.to(self._sum.device, non_blocking=True)

    def discard(self) -> None:
        """Leave out the losses so far: they belong to another model, whose optimizer stepped.

        If no loss follows until the next step, they were the recorded model's after all.
        """
        if self._sum is not None:
            self._discarded = self._sum
            self._sum = None

    def take(self) -> Tensor | None:
        """Return the step's loss; None if nothing was differentiated."""
        loss = self._discarded if self._sum is None else self._sum
        self._sum = None
        self._discarded = None
        return loss

    @property
    def pending(self) -> bool:
        """True if a loss was differentiated since the last step of an optimizer."""
        return self._sum is not None


class BackwardListener:
    """Replacements of `torch.autograd.backward`, which `Tensor.backward` calls, and of GradScaler.

    begins, ends: called around each backward, `ends` with its losses. updated: called after each
    `GradScaler.update`. All three are called through `run`.
    """

    def __init__(
        self,
        run: Run,
        begins: Callable[[], None],
        ends: Callable[[list[Tensor]], None],
        updated: Callable[[], None],
    ) -> None:
        self._run = run
        self._begins = begins
        self._ends = ends
        self._updated = updated
        self._scaled: list[tuple[weakref.ref[Tensor], Tensor]] = []
        """What GradScaler.scale returned, each with the value before."""
        self._scaler: GradScaler | None = None

    def wrap_backward(self, original: Callable[..., None]) -> Callable[..., None]:
        """Return `torch.autograd.backward` with the callbacks around it."""

        def backward(*args: Any, **kwargs: Any) -> None:
            # Checkpoints run backwards of their own inside a backward: parts of the outer one.
            if torch_internals.in_backward():
                return original(*args, **kwargs)
            self._run(self._begins)
            original(*args, **kwargs)
            self._run(lambda: self._ends(self._losses(*args, **kwargs)))
            self._scaled = []
            self._scaler = None

        return backward

    def wrap_scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return `GradScaler.scale` with its arguments kept until the backward."""

        def scale(scaler: GradScaler, outputs: Any) -> Any:
            result = original(scaler, outputs)
            if scaler.is_enabled():
                self._scaler = scaler
                if isinstance(outputs, Tensor) and isinstance(result, Tensor):
                    self._scaled.append((weakref.ref(result), outputs.detach()))
            return result

        return scale

    def wrap_update(self, original: Callable[..., None]) -> Callable[..., None]:
        """Return `GradScaler.update` with the callback behind it."""

        def update(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            self._run(self._updated)

        return update

    def _losses(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [self._unscaled(root, grad) for root, grad in _scalars(*args, **kwargs)]

    @torch.no_grad()
    def _unscaled(self, root: Tensor, grad: Tensor | None) -> Tensor:
        """Return a loss without the scaler's factor, times its weight in the backward."""
        value = next((before for ref, before in self._scaled if ref() is root), None)
        if value is None:
            # The script went on computing with the scaled loss: divide by the factor.
            factor = None if self._scaler is None else torch_internals.loss_scale(self._scaler)
            value = root.detach()
            if factor is not None:
                value = value / factor.to(root.device, non_blocking=True)
        return value.clone().reshape(()) if grad is None else (value * grad.detach()).reshape(())


def _scalars(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: Any = None,
    create_graph: Any = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the single numbers among a backward's arguments, each with its weight if it has one.

    A backward with `inputs` asks for gradients of some tensors and is no step of a training; a
    pipeline's stages pass tensors that are no losses.
    """
    if inputs is not None or not isinstance(tensors, Tensor | list | tuple):
        return
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    given = grad_tensors if grad_tensors is not None else grad_variables
    grads = list(given) if isinstance(given, list | tuple) else [given] * len(roots)
    for root, grad in zip(roots, grads, strict=False):
        if isinstance(root, Tensor) and root.numel() == 1 and (grad is None or grad.numel() == 1):
            yield root, grad
