"""What the controller switches: training whose experts are chosen by older weights, for a while."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from geodiag.hooks.adapters import Layout, find_layout
from geodiag.hooks.adapters.base import Removable, RouterSite

Mode = Literal["off", "warmup", "on", "drain"]
MAX_DELAY = 64


class Rerouting(ABC):
    """Wraps an iterator of batches; `enable` and `disable` take effect at the next step.

    Gate weights are always today's, so gradients flow; only the choice of experts is Δ steps old.
    It is replaced in forwards of a training model that will be differentiated, and in no other. A
    model that is compiled is compiled after this, because a compiled model never notices hooks that
    come later. ValueError for a delay outside 0 to 64, or where the model has no learned router.
    """

    variant: ClassVar[str]
    """What this way of routing is called, in events and in the manifest."""

    def __init__(self, model: nn.Module, delay_steps: int, micro_batches: int) -> None:
        self.model, self.micro_batches = model, micro_batches
        self._layout: Layout = find_layout(model)
        self.routers: list[RouterSite] = [r for r in self._layout.routers if not r.hashed]
        if not self.routers:
            raise ValueError(
                f"{type(model).__name__} has no learned router, so there is nothing to route ahead"
            )
        self.delay_steps = self._checked(delay_steps)
        self.mode: Mode = "off"
        """Of the step under way."""
        self.on_change: Callable[[Mode, Mode], None] = lambda _old, _new: None
        self.on_failure: Callable[[Exception], None] = _raise
        """Routing has gone back to today's choice, for this reason. Raises, unless replaced."""
        self._wanted = False
        self._differentiated = False
        self._handles: list[Removable] = [model.register_forward_pre_hook(self._begin)]

    # -- control -----------------------------------------------------------------------------

    def enable(self, delay_steps: int | None = None) -> None:
        """From the next step on: warm up, then choose by older weights. A new delay waits for
        routing to be off.
        """
        if delay_steps is not None and delay_steps != self.delay_steps:
            if self.mode != "off":
                raise ValueError(
                    f"the delay is {self.delay_steps} until routing is off; it is in {self.mode} now"
                )
            self.delay_steps = self._checked(delay_steps)
        self._wanted = True

    def disable(self) -> None:
        """From the next step on: prepare nothing more, use up what is there, then be off."""
        self._wanted = False

    @property
    @abstractmethod
    def lag(self) -> int:
        """Age in steps of the weights that choose this step's experts."""

    @property
    @abstractmethod
    def replaying(self) -> bool:
        """Whether the batch under way is routed by ids that were captured ahead of time."""

    @property
    @abstractmethod
    def queued(self) -> int:
        """Micro-batches that were fetched and not yet trained on: the source stands so far ahead of
        the training.
        """

    @abstractmethod
    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """The batches of `source`, in its order; with gradient accumulation `micro_batches` of them
        a step, each differentiated before the next is asked for.
        """

    @abstractmethod
    def rewind(self) -> None:
        """Training goes back to an earlier step: what was prepared for the steps behind it is
        forgotten.

        Call it between steps, then begin `batches` anew on a source that stands at that step.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs. Save it between steps."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. ValueError where it does not fit."""

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    # -- for the variants --------------------------------------------------------------------

    def _is_training(self, module: nn.Module) -> bool:
        """Whether a forward of `module` is the training step: an evaluation between steps is not.

        Inside a checkpoint the first forward may run without gradient and the recomputation with
        it; both are.
        """
        return module.training and (self._differentiated or torch.is_grad_enabled())

    def _begin(self, _module: nn.Module, _args: tuple) -> None:
        self._differentiated = torch.is_grad_enabled()

    def _settle(self, mode: Mode) -> None:
        old, self.mode = self.mode, mode
        if old != mode:
            self.on_change(old, mode)

    @staticmethod
    def _checked(delay_steps: int) -> int:
        if not 0 <= delay_steps <= MAX_DELAY:
            raise ValueError(f"delay_steps is 0 to {MAX_DELAY}, not {delay_steps}")
        return delay_steps


def _raise(error: Exception) -> None:
    raise error
