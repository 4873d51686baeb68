"""router-lag: today's hidden states, routed by the routers' weights of Δ steps ago.

This is not anticipatory routing: only the map from hidden state to choice is old, the hidden states
themselves are today's. It needs no second forward and no queue of batches. geodiag keeps the
routers' weights and balancing biases of the last Δ steps, from the first step on, so that routing
can switch on at once. If keeping or applying them fails, the mode returns to today's choice.

    off ──enable──▶ warmup (until weights of Δ steps ago exist) ──▶ on ──disable──▶ off
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from geodiag.defaults import DELAY_STEPS
from geodiag.errors import GeodiagError
from geodiag.hooks import torch_internals
from geodiag.hooks.adapters.base import RouterSite, RouterView
from geodiag.hooks.distributed.sharded_weights import full_from_local, is_dtensor, local
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.routing.tensor_stash import TensorStash

DEVICE_BYTES = 256 << 20


class RouterLag(Rerouting):
    """Chooses experts by the routers' weights of Δ steps ago; used like AnticipatoryRouting.

    device_bytes: memory for the kept weights on the device; weights beyond that are kept in pinned
    host memory.
    """

    variant: ClassVar[str] = "router-lag"

    def __init__(
        self,
        model: nn.Module,
        delay_steps: int = DELAY_STEPS,
        *,
        micro_batches: int = 1,
        device_bytes: int = DEVICE_BYTES,
    ) -> None:
        super().__init__(model, delay_steps, micro_batches)
        self._device_bytes = device_bytes
        self._history: deque[TensorStash] = deque()
        """Weights and biases of every router, one entry per step, today's last."""
        self._lagged: list[Tensor] = []
        """The weights and biases that choose now.

        The tensors stay the same and only their values change, so that compiled code can use them.
        """
        self._today: list[Tensor] = []
        self._on = False
        self._failed = False
        self._views: list[Callable[[], RouterView] | None] = [None] * len(self.routers)
        for index, site in enumerate(self.routers):
            self._handles += site.watch(self._keep_view(index))
            # After the hook that keeps the view, which `_choose` needs, and before all hooks that
            # are added later, so that they receive the choice that is used.
            self._handles.append(site.module.register_forward_hook(self._choose(index, site)))

    @property
    def lag(self) -> int:
        return self.delay_steps if self._on else 0

    @property
    def replaying(self) -> bool:
        return False

    @property
    def queued(self) -> int:
        return 0

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of `source` without fetching ahead."""
        micro = 0
        for batch in source:
            if micro == 0:
                self._begin_step()
            micro = (micro + 1) % self.micro_batches
            try:
                yield batch
            finally:
                if micro == 0:
                    self._on = False
        self._switch_off()

    def rewind(self) -> None:
        """Discard the kept weights; training returns to an earlier step."""
        self._history.clear()
        self._switch_off()

    # -- once a step -------------------------------------------------------------------------

    def _begin_step(self) -> None:
        if self._failed and not self._enabled:
            return
        try:
            self._keep_today()
            self._on = self._enabled and len(self._history) > self.delay_steps
            if self._on:
                self._load_lagged()
        except Exception as e:  # routing must not end a training
            if any(is_dtensor(t) for t in self._today):
                raise GeodiagError(
                    f"router-lag failed on this rank, and the others wait for its weights: {e}"
                ) from e
            self._failed = True
            self._enabled = False
            self._on = False
            self._history.clear()
            self.on_failure(e)
        self._set_mode("on" if self._on else "warmup" if self._enabled else "off")

    @torch.no_grad()
    def _keep_today(self) -> None:
        """Append today's weights to the history, which holds Δ + 1 steps."""
        self._today = [t for r in self.routers for t in (r.weight(), r.bias()) if t is not None]
        self._history.append(self._stash([local(t) for t in self._today]))
        while len(self._history) > self.delay_steps + 1:
            self._history.popleft()

    def _stash(self, tensors: list[Tensor]) -> TensorStash:
        return TensorStash.put(tensors, self._device_bytes // (self.delay_steps + 1))

    @torch.no_grad()
    def _load_lagged(self) -> None:
        """Copy the weights of Δ steps ago into `_lagged`, gathered where they are sharded."""
        parts = self._history[0].take()
        old = [full_from_local(t, like) for t, like in zip(parts, self._today, strict=True)]
        if [(t.shape, t.device) for t in self._lagged] != [(t.shape, t.device) for t in old]:
            self._lagged = [
                torch.empty_like(t, dtype=like.dtype)
                for t, like in zip(old, self._today, strict=True)
            ]
        torch_internals.copy_all(self._lagged, old)

    def _switch_off(self) -> None:
        self._on = False
        self._set_mode("off")

    # -- in the routers ----------------------------------------------------------------------

    def _keep_view(self, index: int) -> Callable[[Callable[[], RouterView]], None]:
        def sink(view: Callable[[], RouterView]) -> None:
            self._views[index] = view if self._on else None

        return sink

    def _choose(self, index: int, site: RouterSite) -> Callable[..., Any]:
        """Return a forward hook that chooses top-k of the lagged scores, as the router does."""
        biased = [r.bias() is not None for r in self.routers]
        weight_at = index + sum(biased[:index])  # `_lagged` holds weight, bias?, weight, bias?, …
        has_bias = biased[index]

        def hook(module: nn.Module, _args: tuple, output: Any) -> Any:
            view = self._views[index]
            self._views[index] = None
            if not self._on or view is None or not self._is_training(module):
                return None
            with torch.no_grad():
                scores_TE = site.rescore(view().hidden_TC, self._lagged[weight_at])
                if has_bias:
                    scores_TE = scores_TE + self._lagged[weight_at + 1]
                ids_TK = scores_TE.topk(site.k, dim=-1).indices
            return site.replay(output, ids_TK)

        return hook

    # -- resume ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "delay_steps": self.delay_steps,
            "mode": self.mode,
            "enabled": self._enabled,
            "history": [entry.on_host() for entry in self._history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(p.device for p in self.model.parameters())
        self.delay_steps = self._checked(state["delay_steps"])
        self.mode = state["mode"]
        self._enabled = state["enabled"]
        self._history = deque(self._stash([t.to(device) for t in e]) for e in state["history"])
        self._on = False
