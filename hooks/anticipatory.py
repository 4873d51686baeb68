"""Anticipatory routing: today's features, the experts that the weights of Δ steps ago choose for the same batch.

At step t the batch of step t+Δ is fetched and one no-grad forward at θ_t records every learned router's expert
ids. When that batch is trained on, the ids are replayed with today's gate weights (arXiv 2606.19348 §4.2.3).

    off ──enable──▶ warmup (Δ captures) ──▶ on ──disable──▶ drain (the queue runs empty) ──▶ off
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters import find_layout
from geodiag.hooks.adapters.base import Removable, RouterSite
from geodiag.hooks.capture import capturing, traceless

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
    accumulation the iterator yields micro-batches, `micro_batches` of them a step. ValueError for a delay outside
    0 to 64, or where the model has no learned router.
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
        self._wanted = False
        self._queue: deque[_Waiting] = deque()
        self._current: list[Tensor] | None = None
        self._data_ended = False
        # First in line, so that whoever watches the router sees the choice that is used.
        self._handles: list[Removable] = [
            r.module.register_forward_hook(self._replay(i, r), prepend=True) for i, r in enumerate(self.routers)
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
                capture = self._wanted if micro == 0 else self.mode in ("warmup", "on")
                waiting = self._next(data, capture)
                if waiting is None:
                    self._settle("off", None)
                    return
                if micro == 0:
                    self._settle(self._mode_of(waiting, capture), waiting.ids)
                self._current = waiting.ids
                yield waiting.batch
                self._current = None

    def _next(self, data: Iterator[Any], capture: bool) -> _Waiting | None:
        ahead = self.delay_steps * self.micro_batches
        while capture and not self._data_ended and len(self._queue) <= ahead:
            if not self._fetch(data):
                break
        if capture and len(self._queue) > ahead and self._queue[-1].ids is None:
            self._queue[-1].ids = self._capture(self._queue[-1].batch)
        if not self._queue and not self._fetch(data):
            return None
        return self._queue.popleft()

    def _fetch(self, data: Iterator[Any]) -> bool:
        try:
            self._queue.append(_Waiting(next(data)))
        except StopIteration:
            self._data_ended = True
        return not self._data_ended

    def _mode_of(self, waiting: _Waiting, capture: bool) -> Mode:
        if capture and not self._data_ended:
            return "on" if waiting.ids is not None else "warmup"
        return "drain" if waiting.ids is not None or self._queue else "off"

    def _settle(self, mode: Mode, ids: list[Tensor] | None) -> None:
        old, self.mode = self.mode, mode
        if old != mode:
            self.on_change(old, mode)

    # -- capture and replay ------------------------------------------------------------------

    def _capture(self, batch: Any) -> list[Tensor]:
        held, self._current = self._current, None
        try:
            with traceless(self.model, evaluate=False), capturing(self.routers) as choices:
                self._forward(self.model, batch)
        finally:
            self._current = held
        return [c.expert_ids_TK.to(torch.int16) for c in choices]

    def _replay(self, place: int, site: RouterSite) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: tuple, output: Any) -> Any:
            # Evaluation between steps is not the batch that the ids were captured for.
            if self._current is None or not module.training:
                return None
            return site.replay(output, self._current[place].long())

        return hook

    # -- resume ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, the queued batches and their ids too. Save it between steps."""
        return {
            "delay_steps": self.delay_steps,
            "mode": self.mode,
            "wanted": self._wanted,
            "queue": [(w.batch, w.ids) for w in self._queue],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delay_steps = self._checked(state["delay_steps"])
        self.mode, self._wanted = state["mode"], state["wanted"]
        self._queue = deque(_Waiting(batch, ids) for batch, ids in state["queue"])
