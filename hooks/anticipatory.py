"""Anticipatory routing: today's features, the experts that the weights of Δ steps ago choose for the same batch.

At step t the batch of step t+Δ is fetched and one no-grad forward at θ_t records every learned router's expert
ids. When that batch is trained on, the ids are replayed with today's gate weights (arXiv 2606.19348 §4.2.3).

    off ──enable──▶ warmup (Δ captures) ──▶ on ──disable──▶ drain (the queue runs empty) ──▶ off
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters import find_layout
from geodiag.hooks.adapters.base import Removable, RouterSite
from geodiag.hooks.capture import Choices, traceless

Mode = Literal["off", "warmup", "on", "drain"]
Forward = Callable[[nn.Module, Any], Any]


@dataclass
class _Waiting:
    """A fetched batch; `ids` once they were captured, one (T, K) int16 tensor a learned router."""

    batch: Any
    ids: list[Tensor] | None = None


def call(model: nn.Module, batch: Any) -> Any:
    """The usual ways to give a model its batch: a mapping as keywords, anything else as the one argument."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


class AnticipatoryRouting:
    """Wraps an iterator of batches; `enable` and `disable` take effect at the next step.

        routing = AnticipatoryRouting(model, delay_steps=8)
        for batch in routing.batches(loader): ...

    `forward(model, batch)` runs the model on a batch; the default passes a mapping as keywords. With gradient
    accumulation the iterator yields micro-batches, `micro_batches` of them a step, each differentiated before the
    next is asked for. Ids are replayed in forwards of a training model that will be differentiated, and in no other.
    A model that is compiled is compiled after this, because a compiled model never notices hooks that come later.
    ValueError for a delay outside 0 to 64, or where the model has no learned router.
    """

    def __init__(
        self, model: nn.Module, delay_steps: int = 8, *, forward: Forward = call, micro_batches: int = 1
    ) -> None:
        self.model, self.micro_batches = model, micro_batches
        self._forward = forward
        self.routers: list[RouterSite] = [r for r in find_layout(model).routers if not r.hashed]
        if not self.routers:
            raise ValueError(f"{type(model).__name__} has no learned router, so there is nothing to route ahead")
        self.delay_steps = self._checked(delay_steps)
        self.mode: Mode = "off"
        """Of the step under way."""
        self.on_change: Callable[[Mode, Mode], None] = lambda _old, _new: None
        self.on_failure: Callable[[Exception], None] = _raise
        """A capture failed, or its ids do not fit: routing has gone back to today's choice. Raises, unless replaced."""
        self._wanted = False
        self._ahead = False
        """Whether this step captures: `_wanted` as it was when the step began."""
        self._queue: deque[_Waiting] = deque()
        self._current: list[Tensor] | None = None
        self._data_ended = False
        self._differentiated = False
        self._autocast: tuple[bool, torch.dtype] | None = None
        self._device = next((p.device.type for p in model.parameters()), "cpu")
        self._choices = Choices(self.routers)
        # First in line, so that whoever watches the router sees the choice that is used.
        self._handles: list[Removable] = [
            self._choices,
            model.register_forward_pre_hook(self._begin),
            *(r.module.register_forward_hook(self._replay(i, r), prepend=True) for i, r in enumerate(self.routers)),
        ]

    # -- control -----------------------------------------------------------------------------

    def enable(self, delay_steps: int | None = None) -> None:
        """From the next step on: warm up, then route ahead. A new delay waits for routing to be off."""
        if delay_steps is not None and delay_steps != self.delay_steps:
            if self.mode != "off":
                raise ValueError(f"the delay is {self.delay_steps} until routing is off; it is in {self.mode} now")
            self.delay_steps = self._checked(delay_steps)
        self._wanted = True

    def disable(self) -> None:
        """From the next step on: capture no more, use up what is queued, then be off."""
        self._wanted = False

    @property
    def replaying(self) -> bool:
        """Whether the batch under way is routed by captured ids."""
        return self._current is not None

    @property
    def lag(self) -> int:
        """Age in steps of the weights that choose this step's experts."""
        return self.delay_steps if self.replaying else 0

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _checked(delay_steps: int) -> int:
        if not 0 <= delay_steps <= 64:
            raise ValueError(f"delay_steps is 0 to 64, not {delay_steps}")
        return delay_steps

    # -- data --------------------------------------------------------------------------------

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """The batches of `source`, in its order; ahead of time while routing is on, as they come while it is off."""
        data = iter(source)
        self._data_ended = False
        while True:
            for micro in range(self.micro_batches):
                if micro == 0:
                    self._ahead = self._wanted
                waiting = self._next(data)
                if waiting is None:
                    self._settle("off")
                    return
                if micro == 0:
                    self._settle(self._mode_of(waiting))
                self._current = waiting.ids
                try:
                    yield waiting.batch
                finally:  # also where the loop is left for good: nothing else may be routed by these ids
                    self._current = None

    def _next(self, data: Iterator[Any]) -> _Waiting | None:
        ahead = self.delay_steps * self.micro_batches
        while self._ahead and not self._data_ended and len(self._queue) <= ahead:
            self._fetch(data)
        if self._ahead and len(self._queue) > ahead and self._queue[-1].ids is None:
            self._queue[-1].ids = self._capture(self._queue[-1].batch)
        if not self._queue:
            self._fetch(data)
        return self._queue.popleft() if self._queue else None

    def _fetch(self, data: Iterator[Any]) -> None:
        try:
            self._queue.append(_Waiting(next(data)))
        except StopIteration:
            self._data_ended = True

    def _mode_of(self, waiting: _Waiting) -> Mode:
        if self._ahead and not self._data_ended:
            return "on" if waiting.ids is not None else "warmup"
        return "drain" if waiting.ids is not None or self._queue else "off"

    def _settle(self, mode: Mode) -> None:
        old, self.mode = self.mode, mode
        if old != mode:
            self.on_change(old, mode)

    # -- capture and replay ------------------------------------------------------------------

    def _capture(self, batch: Any) -> list[Tensor] | None:
        try:
            with self._as_in_training(), traceless(self.model, evaluate=False), self._choices.kept() as choices:
                self._forward(self.model, batch)
        except Exception as e:  # whatever the user's forward raises: `on_failure` says it, or raises it again
            self._give_up(e)
            return None
        return [c.expert_ids_TK.to(torch.int16) for c in choices]

    def _as_in_training(self) -> AbstractContextManager[Any]:
        """The autocast of the last forward that was differentiated: batches are fetched outside of it."""
        if self._autocast is None:
            return nullcontext()
        enabled, dtype = self._autocast
        return torch.autocast(self._device, dtype=dtype, enabled=enabled)

    def _begin(self, _module: nn.Module, _args: tuple) -> None:
        self._differentiated = torch.is_grad_enabled()
        if self._differentiated:
            self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)

    def _replay(self, place: int, site: RouterSite) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: tuple, output: Any) -> Any:
            # Evaluation between steps is not the batch that the ids were captured for. Inside a checkpoint the
            # first forward may run without gradient and the recomputation with it: both are the training step.
            if self._current is None or not module.training or not (self._differentiated or torch.is_grad_enabled()):
                return None
            live, ids = site.chosen(output).expert_ids_TK, self._current[place]
            if ids.shape != live.shape:
                self._give_up(
                    ValueError(
                        f"the experts were chosen for {len(ids)} tokens and the batch has {len(live)}; "
                        "train on each batch as `batches` yields it"
                    )
                )
                return None
            return site.replay(output, ids.to(live))

        return hook

    def _give_up(self, error: Exception) -> None:
        """Back to today's choice from here on: a training must not end because its routing cannot look ahead."""
        self._wanted = self._ahead = False
        self._current = None
        for waiting in self._queue:
            waiting.ids = None
        self.on_failure(error)

    # -- resume ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, the queued batches and their ids too. Save it between steps.

        The source is to resume behind the queued batches, where it stood when this was saved.
        """
        return {
            "delay_steps": self.delay_steps,
            "micro_batches": self.micro_batches,
            "mode": self.mode,
            "wanted": self._wanted,
            "autocast": self._autocast,
            "queue": [(w.batch, w.ids) for w in self._queue],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. ValueError where batches are queued for another number of micro-batches."""
        if state["queue"] and state["micro_batches"] != self.micro_batches:
            raise ValueError(
                f"the queued batches are {state['micro_batches']} a step, not {self.micro_batches}; "
                "resume with the micro_batches it was saved with"
            )
        self.delay_steps = self._checked(state["delay_steps"])
        self.mode, self._wanted, self._autocast = state["mode"], state["wanted"], state["autocast"]
        self._queue = deque(_Waiting(batch, ids) for batch, ids in state["queue"])
        self._current = None


def _raise(error: Exception) -> None:
    raise error
