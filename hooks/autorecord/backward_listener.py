"""What a training differentiates: the loss of a script that does not say it.

A step's loss is the sum of the scalars on which backward was called since the last step, which is
what the optimizer
descends: with gradient accumulation the micro-batches' losses as they were differentiated, so that
it is their mean where the script divides by their number, and their sum where it does not. A
GradScaler's factor is not part of it. Nothing is read on the host.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


class Losses:
    """`add` what was differentiated; `take` the sum once a step."""

    def __init__(self) -> None:
        self._fresh: Tensor | None = None
        self._before: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        self._fresh = (
            loss
            if self._fresh is None
            else self._fresh + loss.to(self._fresh.device, non_blocking=True)
        )

    def pass_by(self) -> None:
        """Another model's optimizer stepped: what came before was its loss, unless nothing comes
        after it.
        """
        if self._fresh is not None:
            self._fresh, self._before = None, self._fresh

    def take(self) -> Tensor | None:
        """The step's loss; None where nothing was differentiated."""
        loss = self._before if self._fresh is None else self._fresh
        self._fresh = self._before = None
        return loss

    @property
    def pending(self) -> bool:
        """Whether something was differentiated that no optimizer has answered yet."""
        return self._fresh is not None


class Ear:
    """Thin wrappers of `torch.autograd.backward`, which Tensor.backward calls too, and of
    GradScaler.

    `guarded` calls `begins` and `ends` around each backward, the latter with its scalars, and
    `updated` after GradScaler.update.
    """

    def __init__(
        self,
        guarded: Callable[[Callable[[], None]], None],
        begins: Callable[[], None],
        ends: Callable[[list[Tensor]], None],
        updated: Callable[[], None],
    ) -> None:
        self._guarded, self._begins, self._ends, self._updated = guarded, begins, ends, updated
        self._scaled: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self._scaler: GradScaler | None = None
        self._originals = torch.autograd.backward, GradScaler.scale, GradScaler.update
        self.on = True
        """Off, the wrappers only pass on; a script may have kept one by its name."""
        torch.autograd.backward = self._backward(torch.autograd.backward)
        GradScaler.scale = self._scale(GradScaler.scale)  # type: ignore[method-assign]
        GradScaler.update = self._update(GradScaler.update)  # type: ignore[method-assign]

    def close(self) -> None:
        """Hears nothing more."""
        self.on = False
        torch.autograd.backward, GradScaler.scale, GradScaler.update = self._originals  # type: ignore[method-assign]

    def _backward(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def backward(*args: Any, **kwargs: Any) -> None:
            # Inside a backward, checkpoints run backwards of their own: those are parts of the one
            # that is heard.
            if (
                torch.compiler.is_compiling()
                or not self.on
                or torch._C._current_graph_task_id() != -1
            ):
                return original(*args, **kwargs)
            self._guarded(self._begins)
            original(*args, **kwargs)
            self._guarded(
                lambda: self._ends([self._unscaled(*found) for found in _scalars(*args, **kwargs)])
            )
            self._scaled, self._scaler = [], None

        return backward

    def _scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            result = original(scaler, outputs)
            if self.on and scaler.is_enabled():
                self._scaler = scaler
                if isinstance(outputs, Tensor) and isinstance(result, Tensor):
                    self._scaled.append((weakref.ref(result), outputs.detach()))
            return result

        return scale

    def _update(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def update(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            if self.on:
                self._guarded(self._updated)

        return update

    @torch.no_grad()
    def _unscaled(self, root: Tensor, grad: Tensor | None) -> Tensor:
        """The loss before a scaler made it larger: as it was, or by the scaler's factor where the
        script went on with what it got.
        """
        factor = self._scaler._scale if self._scaler is not None else None
        value = next((was for ref, was in self._scaled if ref() is root), None)
        if value is None:
            value = (
                root.detach()
                if factor is None
                else root.detach() / factor.to(root.device, non_blocking=True)
            )
        return value.clone().reshape(()) if grad is None else (value * grad.detach()).reshape(())


def _scalars(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: Any = None,
    create_graph: Any = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What of a backward's arguments may be a loss: single numbers, each with its weight if it was
    given one.

    With `inputs` somebody asks for gradients of their own, and a pipeline's stages hand on what is
    no loss.
    """
    if inputs is not None or not isinstance(tensors, Tensor | list | tuple):
        return
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    given = grad_tensors if grad_tensors is not None else grad_variables
    grads = list(given) if isinstance(given, list | tuple) else [given] * len(roots)
    for root, grad in zip(roots, grads, strict=False):
        if isinstance(root, Tensor) and root.numel() == 1 and (grad is None or grad.numel() == 1):
            yield root, grad
