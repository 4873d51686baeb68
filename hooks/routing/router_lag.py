"""router-lag: today's hidden states, routed by the routers' weights of Δ steps ago. Not
anticipatory routing.

Only the last map from hidden state to choice is old; the hidden states themselves are today's.
There is no second forward and no queue of batches: what is kept is the routers' weights and
balancing biases of the last Δ steps.

    off ──enable──▶ warmup (until there are weights of Δ steps ago) ──▶ on ──disable──▶ off
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.base import RouterSite, RouterView
from geodiag.hooks.distributed.sharded_weights import full_from_local, is_dtensor, local
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.routing.tensor_stash import TensorStash

DEVICE_BYTES = 256 << 20


class RouterLag(Rerouting):
    """Experts by the router's weights of Δ steps ago; used as AnticipatoryRouting is.

    The past is kept from the first step on, so that routing which is switched on late begins at
    once. It takes up to
    `device_bytes` on the device, and beyond that stays in pinned host memory.
    """

    variant: ClassVar[str] = "router-lag"

    def __init__(
        self,
        model: nn.Module,
        delay_steps: int = 8,
        *,
        micro_batches: int = 1,
        device_bytes: int = DEVICE_BYTES,
    ) -> None:
        super().__init__(model, delay_steps, micro_batches)
        self._device_bytes = device_bytes
        self._past: deque[TensorStash] = deque()
        """Weights and biases of every router, one entry a step, today's last."""
        self._lagged: list[Tensor] = []
        """The ones that choose now, always in the same place: a compiled model does not look
        elsewhere.
        """
        self._today: list[Tensor] = []
        self._on = self._failed = False
        self._views: list[Callable[[], RouterView] | None] = [None] * len(self.routers)
        for place, site in enumerate(self.routers):
            self._handles += site.watch(self._keep_view(place))
            # Before whoever watches the router, and behind the view that it needs.
            self._handles.append(site.module.register_forward_hook(self._choose(place, site)))

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
        """The batches of `source` as they come."""
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
        self._leave()

    def rewind(self) -> None:
        self._past.clear()
        self._leave()

    # -- once a step -------------------------------------------------------------------------

    def _begin_step(self) -> None:
        if self._failed and not self._wanted:
            return
        try:
            self._remember()
            self._on = self._wanted and len(self._past) > self.delay_steps
            if self._on:
                self._make_lagged()
        except Exception as e:  # a training must not end because its routing cannot look back
            if any(is_dtensor(t) for t in self._today):
                raise GeodiagError(
                    f"router-lag failed on this rank, and the others wait for its weights: {e}"
                ) from e
            self._failed, self._wanted, self._on = True, False, False
            self._past.clear()
            self.on_failure(e)
        self._settle("on" if self._on else "warmup" if self._wanted else "off")

    @torch.no_grad()
    def _remember(self) -> None:
        self._today = [t for r in self.routers for t in (r.weight(), r.bias()) if t is not None]
        room = self._device_bytes // (self.delay_steps + 1)
        self._past.append(TensorStash.put([local(t) for t in self._today], room))
        while len(self._past) > self.delay_steps + 1:
            self._past.popleft()

    @torch.no_grad()
    def _make_lagged(self) -> None:
        """Brings the weights of Δ steps ago to the place where the routers look for them."""
        then = [
            full_from_local(t, like)
            for t, like in zip(self._past[0].take(), self._today, strict=True)
        ]
        if [(t.shape, t.device) for t in self._lagged] != [(t.shape, t.device) for t in then]:
            self._lagged = [
                torch.empty_like(t, dtype=like.dtype)
                for t, like in zip(then, self._today, strict=True)
            ]
        torch._foreach_copy_(self._lagged, then)

    def _leave(self) -> None:
        self._on = False
        self._settle("off")

    # -- in the routers ----------------------------------------------------------------------

    def _keep_view(self, place: int) -> Callable[[Callable[[], RouterView]], None]:
        def sink(view: Callable[[], RouterView]) -> None:
            self._views[place] = view if self._on else None

        return sink

    def _choose(self, place: int, site: RouterSite) -> Callable[..., Any]:
        biased = [r.bias() is not None for r in self.routers]
        weight_at = place + sum(biased[:place])
        has_bias = biased[place]

        def hook(module: nn.Module, _args: tuple, output: Any) -> Any:
            make, self._views[place] = self._views[place], None
            if not self._on or make is None or not self._is_training(module):
                return None
            with torch.no_grad():
                scores = site.rescore(make().hidden_TC, self._lagged[weight_at])
                if has_bias:
                    scores = scores + self._lagged[weight_at + 1]
                ids = scores.topk(site.k, dim=-1).indices
            return site.replay(output, ids)

        return hook

    # -- resume ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "delay_steps": self.delay_steps,
            "mode": self.mode,
            "wanted": self._wanted,
            "past": [entry.on_host() for entry in self._past],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(p.device for p in self.model.parameters())
        self.delay_steps = self._checked(state["delay_steps"])
        self.mode, self._wanted = state["mode"], state["wanted"]
        room = self._device_bytes // (self.delay_steps + 1)
        self._past = deque(
            TensorStash.put([t.to(device) for t in entry], room) for entry in state["past"]
        )
        self._on = False
