"""Base class of routing variants: training with experts that were chosen by older weights.

A variant only replaces the choice of experts, in forwards of a training model that will be
differentiated. Gate weights always come from today's router, so gradients flow as usual. The
controller switches a variant with `enable` and `disable`; both take effect at the next step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from geodiag.defaults import MAX_DELAY_STEPS
from geodiag.hooks.adapters import Layout, find_layout
from geodiag.hooks.adapters.base import Removable, RouterSite

Mode = Literal["off", "warmup", "on", "drain"]


class Rerouting(ABC):
    """Wraps an iterator of batches and replaces the routers' choice of experts.

    delay_steps: Δ, the age in steps of the weights that choose the experts. micro_batches: batches
    per optimizer step.

    Create it before the model is compiled: compiled code does not call hooks that are added later.
    ValueError for a delay outside 0 to 64, or if the model has no learned router.
    """

    variant: ClassVar[str]
    """Name of the variant, in events and in the manifest."""

    def __init__(self, model: nn.Module, delay_steps: int, micro_batches: int) -> None:
        self.model = model
        self.micro_batches = micro_batches
        self._layout: Layout = find_layout(model)
        self.routers: list[RouterSite] = [r for r in self._layout.routers if not r.hashed]
        if not self.routers:
            raise ValueError(
                f"{type(model).__name__} has no learned router, so there is no choice to replace"
            )
        self.delay_steps = self._checked(delay_steps)

        self.mode: Mode = "off"
        """Mode of the current step."""
        self.on_change: Callable[[Mode, Mode], None] = lambda _old, _new: None
        """Called with the old and the new mode when the mode changes."""
        self.on_failure: Callable[[Exception], None] = _raise
        """Called when routing fails and returns to today's choice. Raises, unless replaced."""

        self._enabled = False
        """What the last `enable` or `disable` requested."""
        self._grad_enabled = False
        """Whether the current forward of the model runs with gradients."""
        self._handles: list[Removable] = [model.register_forward_pre_hook(self._before_forward)]

    # -- control -----------------------------------------------------------------------------

    def enable(self, delay_steps: int | None = None) -> None:
        """Start at the next step: warm up, then choose experts by older weights.

        ValueError for a new delay while the mode is not `off`.
        """
        if delay_steps is not None and delay_steps != self.delay_steps:
            if self.mode != "off":
                raise ValueError(
                    f"the delay stays {self.delay_steps} until routing is off; "
                    f"it is in {self.mode} now"
                )
            self.delay_steps = self._checked(delay_steps)
        self._enabled = True

    def disable(self) -> None:
        """Stop at the next step: prepare nothing more, use what is prepared, then switch off."""
        self._enabled = False

    @property
    @abstractmethod
    def lag(self) -> int:
        """Age in steps of the weights that choose this step's experts."""

    @property
    @abstractmethod
    def replaying(self) -> bool:
        """Whether the current batch is routed by expert ids that were captured earlier."""

    @property
    @abstractmethod
    def queued(self) -> int:
        """Number of micro-batches that were fetched from the source and not yet trained on."""

    @abstractmethod
    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of `source` in order, `micro_batches` of them per step.

        Each batch must be differentiated before the next one is requested.
        """

    @abstractmethod
    def rewind(self) -> None:
        """Discard everything prepared for later steps, because training returns to an earlier step.

        Call it between steps, then call `batches` again with a source positioned at that step.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs. Call it between steps."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. ValueError if it does not fit."""

    def remove(self) -> None:
        """Remove all hooks from the model."""
        for handle in self._handles:
            handle.remove()

    # -- for the variants --------------------------------------------------------------------

    def _is_training(self, module: nn.Module) -> bool:
        """Return whether this forward of `module` belongs to the training step.

        An evaluation between steps does not. Under activation checkpointing the first forward may
        run without gradients and the recomputation with them; both belong to the training step.
        """
        return module.training and (self._grad_enabled or torch.is_grad_enabled())

    def _before_forward(self, _module: nn.Module, _args: tuple) -> None:
        self._grad_enabled = torch.is_grad_enabled()

    def _set_mode(self, mode: Mode) -> None:
        old_mode = self.mode
        self.mode = mode
        if old_mode != mode:
            self.on_change(old_mode, mode)

    @staticmethod
    def _checked(delay_steps: int) -> int:
        if not 0 <= delay_steps <= MAX_DELAY_STEPS:
            raise ValueError(f"delay_steps is 0 to {MAX_DELAY_STEPS}, not {delay_steps}")
        return delay_steps


def _raise(error: Exception) -> None:
    raise error
