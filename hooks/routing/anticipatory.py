"""Anticipatory routing: today's features, routed by the experts that θ of Δ steps ago chooses.

Source: arXiv 2606.19348 §4.2.3, for the same batch and every learned router.

    off ──enable──▶ warmup (Δ captures) ──▶ on ──disable──▶ drain (the queue runs empty) ──▶ off

At step t the batch of step t+Δ is fetched, and one forward without gradients at θ_t captures every
learned router's expert ids. Batch and ids wait together in a queue of Δ steps, because ids are only
valid for the tokens that they were chosen for. When the batch is trained on at step t+Δ, the ids
replace the routers' own choice; the gate weights are gathered from θ_{t+Δ}'s scores at these ids,
so gradients flow. During warmup the first Δ batches train with today's choice; during drain no new
ids are captured and the queued ids are used up. The capture is isolated: random states, buffers,
load counters and modes are restored after it. With Δ = 0 the training is bitwise the plain one. If
a capture or a replay fails, the mode returns to today's choice, the queued ids are discarded, the
batches are kept, and `on_failure` is called.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from geodiag.defaults import DELAY_STEPS
from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import RouterSite
from geodiag.hooks.adapters.module_hooks import register_first_hook
from geodiag.hooks.distributed.sharded_weights import CollectiveAborted, complete_on_all_ranks
from geodiag.hooks.routing.base import Mode, Rerouting
from geodiag.hooks.routing.isolated_forward import RouterChoices, isolated
from geodiag.hooks.routing.tensor_stash import TensorStash

# T tokens, K experts per token

Forward = Callable[[nn.Module, Any], Any]
DEVICE_BYTES = 256 << 20


@dataclass
class _QueuedBatch:
    """A fetched batch with its captured expert ids, one (T, K) int16 tensor per learned router.

    `ids` is None until the ids are captured, and for batches that are trained with today's choice.
    """

    batch: Any
    ids: TensorStash | None = None


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call `model` on `batch`: a mapping as keyword arguments, anything else as one argument."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


class AnticipatoryRouting(Rerouting):
    """Routes each batch by the experts that the weights of Δ steps ago choose for the same batch.

        routing = AnticipatoryRouting(model, delay_steps=8)
        for batch in routing.batches(loader): ...

    forward: runs the model on a batch; the default passes a mapping as keyword arguments. The
    forward ends when the last router has chosen; a model that is compiled as a whole or sharded by
    FSDP runs to its end. device_bytes: memory for queued ids on the device; ids beyond that are
    kept in pinned host memory.
    """

    variant: ClassVar[str] = "anticipatory"

    def __init__(
        self,
        model: nn.Module,
        delay_steps: int = DELAY_STEPS,
        *,
        forward: Forward = call_model,
        micro_batches: int = 1,
        device_bytes: int = DEVICE_BYTES,
    ) -> None:
        super().__init__(model, delay_steps, micro_batches)
        self._forward = forward
        self._device_bytes = device_bytes
        self._device = self._model_device()

        self._capturing = False
        """Whether this step captures: the value of `_enabled` when the step began."""
        self._queue: deque[_QueuedBatch] = deque()
        self._current_ids: list[Tensor] | None = None
        """Expert ids of the current batch, one tensor per learned router."""
        self._data_ended = False
        self._autocast: tuple[bool, torch.dtype] | None = None
        """Autocast state of the last training forward."""

        self._choices = RouterChoices(
            self.routers, model, self._layout.watch_end, self._layout.tail
        )
        self._handles.append(self._choices)
        for index, router in enumerate(self.routers):
            # Before all other hooks of the router, so that they receive the choice that is used.
            hook = self._replay_hook(index, router)
            self._handles.append(register_first_hook(router.module, hook))

    @property
    def replaying(self) -> bool:
        return self._current_ids is not None

    @property
    def lag(self) -> int:
        return self.delay_steps if self.replaying else 0

    @property
    def queued(self) -> int:
        return len(self._queue)

    # -- data --------------------------------------------------------------------------------

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of `source` in order; fetch them Δ steps ahead while routing is on.

        With gradient accumulation `source` yields micro-batches, `micro_batches` of them per step.
        Each batch must be differentiated before the next one is requested.
        """
        data = iter(source)
        self._data_ended = False
        self._device = self._model_device()
        while True:
            for micro in range(self.micro_batches):
                if micro == 0:
                    self._capturing = self._enabled
                queued = self._next_batch(data)
                if queued is None:
                    self._set_mode("off")
                    return
                if micro == 0:
                    self._set_mode(self._mode_for(queued))

                self._current_ids = None if queued.ids is None else queued.ids.take()
                try:
                    yield queued.batch
                finally:
                    # Also when the loop ends early: no other batch may be routed by these ids.
                    self._current_ids = None

    def _next_batch(self, data: Iterator[Any]) -> _QueuedBatch | None:
        """Fill the queue, capture the ids of its newest batch, and return its oldest batch."""
        ahead = self.delay_steps * self.micro_batches
        while self._capturing and not self._data_ended and len(self._queue) <= ahead:
            self._fetch(data)

        # Only the batch that is exactly Δ steps ahead is captured: its ids are then Δ steps old
        # when it is trained on. The batches before it (warmup) train with today's choice.
        if self._capturing and len(self._queue) > ahead and self._queue[-1].ids is None:
            self._queue[-1].ids = self._capture(self._queue[-1].batch)

        if not self._queue:
            self._fetch(data)
        return self._queue.popleft() if self._queue else None

    def _fetch(self, data: Iterator[Any]) -> None:
        try:
            self._queue.append(_QueuedBatch(next(data)))
        except StopIteration:
            self._data_ended = True

    def _mode_for(self, queued: _QueuedBatch) -> Mode:
        """Return the mode of the step that trains on this batch."""
        if self._capturing and not self._data_ended:
            return "on" if queued.ids is not None else "warmup"
        return "drain" if queued.ids is not None or self._queue else "off"

    def rewind(self) -> None:
        """Discard queued batches and ids; training returns to an earlier step."""
        self._queue.clear()
        self._current_ids = None
        self._set_mode("off")

    # -- capture and replay ------------------------------------------------------------------

    def _capture(self, batch: Any) -> TensorStash | None:
        """Run one isolated forward and return every router's expert ids, None if it failed."""
        try:
            with (
                # The outermost context: it checks after the forward that every router has chosen.
                self._choices.recording() as choices,
                complete_on_all_ranks(self.model),
                self._training_autocast(),
                isolated(self.model, evaluate=False),
            ):
                self._forward(self.model, batch)
            return self._stash([c.expert_ids_TK.to(torch.int16) for c in choices])
        except CollectiveAborted as e:
            raise GeodiagError(
                f"{e}; the training ends, because the other ranks still wait in this forward"
            ) from e
        except Exception as e:  # the user's forward may raise anything; `on_failure` decides
            self._fail(e)
            return None

    def _stash(self, ids: list[Tensor]) -> TensorStash:
        batches = self.delay_steps * self.micro_batches + 1
        return TensorStash.put(ids, device_bytes=self._device_bytes // batches)

    def _model_device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def _training_autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast of the last training forward: `batches` runs outside of it."""
        if self._autocast is None:
            return nullcontext()
        enabled, dtype = self._autocast
        return torch.autocast(self._device.type, dtype=dtype, enabled=enabled)

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        super()._before_forward(module, args)
        if self._grad_enabled:
            device = self._device.type
            self._autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def _replay_hook(self, index: int, site: RouterSite) -> Callable[..., Any]:
        """Return a forward hook that replaces the router's choice by the captured ids."""

        def hook(module: nn.Module, _args: tuple, output: Any) -> Any:
            if self._current_ids is None or not self._is_training(module):
                return None
            live_ids = site.chosen(output).expert_ids_TK
            ids = self._current_ids[index]
            if ids.shape != live_ids.shape:
                self._fail(
                    ValueError(
                        f"the experts were chosen for {len(ids)} tokens and the batch has "
                        f"{len(live_ids)}; train on each batch as `batches` yields it"
                    )
                )
                return None
            return site.replay(output, ids.to(live_ids))

        return hook

    def _fail(self, error: Exception) -> None:
        """Return to today's choice and discard all captured ids; the training goes on."""
        self._enabled = False
        self._capturing = False
        self._current_ids = None
        for queued in self._queue:
            queued.ids = None
        self.on_failure(error)

    # -- resume ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs, including queued batches and their ids.

        Call it between steps. The resumed source must continue after the queued batches, at its
        position of the time of this call.
        """
        return {
            "delay_steps": self.delay_steps,
            "micro_batches": self.micro_batches,
            "mode": self.mode,
            "enabled": self._enabled,
            "autocast": self._autocast,
            "queue": [(q.batch, q.ids and q.ids.on_host()) for q in self._queue],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. ValueError if its queue has another number of micro-batches."""
        if state["queue"] and state["micro_batches"] != self.micro_batches:
            raise ValueError(
                f"the queued batches are {state['micro_batches']} a step, not "
                f"{self.micro_batches}; resume with the micro_batches it was saved with"
            )
        self.delay_steps = self._checked(state["delay_steps"])
        self.mode = state["mode"]
        self._enabled = state["enabled"]
        self._autocast = state["autocast"]
        device = self._model_device()
        self._queue = deque(
            _QueuedBatch(batch, ids and self._stash([i.to(device) for i in ids]))
            for batch, ids in state["queue"]
        )
        self._current_ids = None
