"""Actions that last for a period, besides routing: a lower learning rate, and the SwiGLU clamp."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.control.policy import Clamp, LowerLr, Policy


class Interventions:
    """Applies and reverts a policy's lasting actions. Applying an action twice has no more effect.

    GeodiagError if the policy acts and one of its actions is impossible in this training.
    """

    def __init__(self, optimizers: Sequence[Optimizer], layout: Layout, policy: Policy) -> None:
        self._optimizers = optimizers
        self._layout = layout
        self._handles: list[Removable] = []
        self._clamped = False
        self.lr_scale = 1.0
        """Factor on the learning rates inside `optimizer.step`; between steps `param_groups` hold
        the training's own values.
        """

        if policy.mode == "off":
            return
        if policy.does(LowerLr) and not optimizers:
            raise GeodiagError("lower-lr needs the optimizer; pass it to attach")
        if policy.does(Clamp) and not any(e.set_limit for e in layout.experts):
            raise GeodiagError(
                f"a {layout.family} model has no SwiGLU clamp to switch on; "
                "leave the action clamp out"
            )

    def effective_lr(self, lr: float | None) -> float | None:
        """Return the learning rate that the optimizers step with.

        lr: the trainer's own; default: that of the first group of the first optimizer.
        """
        if lr is None and self._optimizers and self._optimizers[0].param_groups:
            lr = float(self._optimizers[0].param_groups[0]["lr"])
        return None if lr is None else lr * self.lr_scale

    def apply(self, action: str, policy: Policy) -> None:
        """Apply `lower-lr` or `clamp` with the policy's value."""
        if action == LowerLr.name and policy.lower_lr is not None and not self._handles:
            self.lr_scale = policy.lower_lr.factor
            for optimizer in self._optimizers:
                scaled = _ScaledLearningRates(self.lr_scale)
                self._handles += [
                    optimizer.register_step_pre_hook(scaled.before_step),
                    optimizer.register_step_post_hook(scaled.after_step),
                ]
        if action == Clamp.name and policy.clamp is not None:
            self._clamped = True
            limit = policy.clamp.limit
            for site in self._layout.experts:
                if site.set_limit is not None:
                    own = site.gate_limit
                    site.set_limit(limit if own is None else min(limit, own))

    def revert(self, action: str) -> None:
        """Restore the state before `apply`."""
        if action == "lower-lr":
            self.lr_scale = 1.0
            for handle in self._handles:
                handle.remove()
            self._handles = []
        if action == "clamp" and self._clamped:
            self._clamped = False
            for site in self._layout.experts:
                if site.set_limit is not None:
                    site.set_limit(site.gate_limit)


class _ScaledLearningRates:
    """Scales one optimizer's learning rates during `step` and restores them after it.

    A scheduler therefore always reads its own values. A tensor learning rate is changed in place,
    because a compiled optimizer step holds on to the tensor.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._original: list[Any] = []

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._original = []
        for group in optimizer.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                self._original.append(lr.clone())
                lr.mul_(self._factor)
            else:
                self._original.append(lr)
                group["lr"] = lr * self._factor

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for group, original in zip(optimizer.param_groups, self._original, strict=True):
            if isinstance(original, Tensor):
                group["lr"].copy_(original)
            else:
                group["lr"] = original
