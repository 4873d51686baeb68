"""What lasts for a period beside the routing: a lower learning rate, and the SwiGLU clamp."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.control.policy import Policy


class Interventions:
    """Turns what a policy wants turned, and back. Turning twice is turning once.

    GeodiagError where the policy is to act and its actions cannot be carried out.
    """

    def __init__(self, optimizers: Sequence[Optimizer], layout: Layout, policy: Policy) -> None:
        self._optimizers, self._layout = optimizers, layout
        self._handles: list[Removable] = []
        self._clamped = False
        self.lr_scale = 1.0
        """Factor on the learning rates while the optimizers step; between steps they are the
        trainer's own.
        """
        if policy.mode == "off":
            return
        if policy.does("lower-lr") and not optimizers:
            raise GeodiagError("lower-lr needs the optimizer; pass it to attach")
        if policy.does("clamp") and not any(e.set_limit for e in layout.experts):
            raise GeodiagError(
                f"a {layout.family} model has no SwiGLU clamp to switch on; leave the action clamp out"
            )

    def apply(self, action: str, policy: Policy) -> None:
        """`lower-lr` or `clamp`, as the policy says."""
        if action == "lower-lr" and not self._handles:
            self.lr_scale = policy.value("lower-lr")
            for optimizer in self._optimizers:
                lowered = _Lowered(self.lr_scale)
                self._handles += [
                    optimizer.register_step_pre_hook(lowered.before),
                    optimizer.register_step_post_hook(lowered.after),
                ]
        if action == "clamp":
            self._clamped = True
            for site in self._layout.experts:
                if site.set_limit is not None:
                    limit = policy.value("clamp")
                    site.set_limit(
                        limit if site.gate_limit is None else min(limit, site.gate_limit)
                    )

    def revert(self, action: str) -> None:
        """As it was before `turn`."""
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


class _Lowered:
    """One optimizer's learning rates while it steps; in place where they are tensors, which a
    compiled step holds.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._own: list[Any] = []

    @torch.no_grad()
    def before(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._own = []
        for group in optimizer.param_groups:
            lr = group["lr"]
            self._own.append(lr.clone() if isinstance(lr, Tensor) else lr)
            group["lr"] = lr.mul_(self._factor) if isinstance(lr, Tensor) else lr * self._factor

    @torch.no_grad()
    def after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for group, own in zip(optimizer.param_groups, self._own, strict=True):
            if isinstance(own, Tensor):
                group["lr"].copy_(own)
            else:
                group["lr"] = own
