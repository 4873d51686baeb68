"""Anticipatory routing: today's features, the experts that the weights of Δ steps ago choose for
the same batch.

At step t the batch of step t+Δ is fetched and one no-grad forward at θ_t records every learned
router's expert ids. When that batch is trained on, the ids are replayed with today's gate weights
(arXiv 2606.19348 §4.2.3).

    off ──enable──▶ warmup (Δ captures) ──▶ on ──disable──▶ drain (the queue runs empty) ──▶ off
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import RouterSite, register_first_hook
from geodiag.hooks.distributed.sharded_weights import CollectiveAborted, complete_on_all_ranks
from geodiag.hooks.routing.base import Mode, Rerouting
from geodiag.hooks.routing.isolated_forward import RouterChoices, isolated
from geodiag.hooks.routing.tensor_stash import TensorStash

Forward = Callable[[nn.Module, Any], Any]
DEVICE_BYTES = 256 << 20


@dataclass
class _Waiting:
    """A fetched batch; `ids` once they were captured, one (T, K) int16 tensor a learned router."""

    batch: Any
    ids: TensorStash | None = None


def call(model: nn.Module, batch: Any) -> Any:
    """The usual ways to give a model its batch: a mapping as keywords, anything else as the one
    argument.
    """
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


class AnticipatoryRouting(Rerouting):
    """Experts by the weights of Δ steps ago, for the very batch that is trained on.

        routing = AnticipatoryRouting(model, delay_steps=8)
        for batch in routing.batches(loader): ...

    `forward(model, batch)` runs the model on a batch; the default passes a mapping as keywords. It
    is left as soon as the last router has chosen; where the model is compiled as a whole or sharded
    by FSDP it runs to its end. Waiting ids take up to `device_bytes` on the device, and beyond that
    stay in pinned host memory.
    """

    variant: ClassVar[str] = "anticipatory"

    def __init__(
        self,
        model: nn.Module,
        delay_steps: int = 8,
        *,
        forward: Forward = call,
        micro_batches: int = 1,
        device_bytes: int = DEVICE_BYTES,
    ) -> None:
        super().__init__(model, delay_steps, micro_batches)
        self._forward, self._device_bytes = forward, device_bytes
        self._ahead = False
        """Whether this step captures: `_wanted` as it was when the step began."""
        self._queue: deque[_Waiting] = deque()
        self._current: list[Tensor] | None = None
        self._data_ended = False
        self._autocast: tuple[bool, torch.dtype] | None = None
        self._device = self._where()
        self._choices = RouterChoices(
            self.routers, model, self._layout.watch_end, self._layout.tail
        )
        # First in line, so that whoever watches the router sees the choice that is used.
        self._handles += [
            self._choices,
            *(
                register_first_hook(r.module, self._replay(i, r))
                for i, r in enumerate(self.routers)
            ),
        ]

    @property
    def replaying(self) -> bool:
        return self._current is not None

    @property
    def lag(self) -> int:
        return self.delay_steps if self.replaying else 0

    @property
    def queued(self) -> int:
        return len(self._queue)

    # -- data --------------------------------------------------------------------------------

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """The batches of `source`, in its order; ahead of time while routing is on, as they come
        while it is off.

        With gradient accumulation `source` yields micro-batches, `micro_batches` of them a step,
        and each is differentiated before the next is asked for.
        """
        data = iter(source)
        self._data_ended, self._device = False, self._where()
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
                self._current = None if waiting.ids is None else waiting.ids.take()
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

    def rewind(self) -> None:
        self._queue.clear()
        self._current = None
        self._settle("off")

    # -- capture and replay ------------------------------------------------------------------

    def _capture(self, batch: Any) -> TensorStash | None:
        try:
            with (
                self._choices.recording() as choices,  # around the rest: what it misses, a forward at its end has left out
                complete_on_all_ranks(self.model),
                self._as_in_training(),
                isolated(self.model, evaluate=False),
            ):
                self._forward(self.model, batch)
            return self._put([c.expert_ids_TK.to(torch.int16) for c in choices])
        except CollectiveAborted as e:
            raise GeodiagError(
                f"{e}; the training ends, because the other ranks are in it still"
            ) from e
        except (
            Exception
        ) as e:  # whatever the user's forward raises: `on_failure` says it, or raises it again
            self._give_up(e)
            return None

    def _put(self, ids: list[Tensor]) -> TensorStash:
        return TensorStash.put(
            ids, room=self._device_bytes // (self.delay_steps * self.micro_batches + 1)
        )

    def _where(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _as_in_training(self) -> AbstractContextManager[Any]:
        """The autocast of the last forward that was differentiated: batches are fetched outside of
        it.
        """
        if self._autocast is None:
            return nullcontext()
        enabled, dtype = self._autocast
        return torch.autocast(self._device.type, dtype=dtype, enabled=enabled)

    def _begin(self, module: nn.Module, args: tuple) -> None:
        super()._begin(module, args)
        if self._differentiated:
            self._autocast = _autocast_on(self._device.type)

    def _replay(self, place: int, site: RouterSite) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: tuple, output: Any) -> Any:
            if self._current is None or not self._is_training(module):
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
        """Back to today's choice from here on: a training must not end because its routing cannot
        look ahead.
        """
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
            "queue": [(w.batch, w.ids and w.ids.on_host()) for w in self._queue],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. ValueError where batches are queued for another number of
        micro-batches.
        """
        if state["queue"] and state["micro_batches"] != self.micro_batches:
            raise ValueError(
                f"the queued batches are {state['micro_batches']} a step, not {self.micro_batches}; "
                "resume with the micro_batches it was saved with"
            )
        self.delay_steps = self._checked(state["delay_steps"])
        self.mode, self._wanted, self._autocast = state["mode"], state["wanted"], state["autocast"]
        self._queue = deque(
            _Waiting(batch, ids and self._put([i.to(self._where()) for i in ids]))
            for batch, ids in state["queue"]
        )
        self._current = None


def _autocast_on(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
