"""The probe: the same tokens again and again, so that a changed choice of experts is the model's doing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks import metrics
from geodiag.hooks.adapters.base import Choice, RouterSite
from geodiag.hooks.capture import Choices, traceless

PROBE_TOKENS = 4096


class Probe:
    """Runs `model` on a fixed batch and compares each router's choice with the last time's."""

    def __init__(self, model: nn.Module, routers: Sequence[RouterSite], args: tuple = (), kwargs: dict | None = None):
        self.model, self.routers = model, routers
        self._choices = Choices(routers)
        self._args, self._kwargs = args, kwargs or {}
        self._last: list[Choice] | None = None

    @property
    def ready(self) -> bool:
        """Whether there is a batch to probe with."""
        return bool(self._args or self._kwargs)

    def adopt(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Takes what the model was called with as the probe batch; at most `PROBE_TOKENS` tokens of it."""
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        ids = next((t for t in tensors if t.dim() == 2 and not t.is_floating_point()), None)
        rows = max(1, PROBE_TOKENS // ids.shape[1]) if ids is not None else None

        def few(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            same_batch = ids is not None and value.dim() > 0 and value.shape[0] == ids.shape[0]
            return (value[:rows] if same_batch else value).detach().clone()

        self._args, self._kwargs = tuple(few(a) for a in args), {k: few(v) for k, v in kwargs.items()}

    def run(self) -> dict[str, Tensor]:
        """Flips since the last run, one value a router; empty the first time."""
        with traceless(self.model, evaluate=True), self._choices.kept() as choices:
            self.model(*self._args, **self._kwargs)
        last, self._last = self._last, choices
        if last is None:
            return {}
        rate, top1, anyone = [], [], []
        for site, now, then in zip(self.routers, choices, last, strict=True):
            flipped = metrics.flips(now.expert_ids_TK, then.expert_ids_TK)
            rate.append(flipped.mean())
            anyone.append((flipped > 0).float().mean())
            top1.append((_first(site, now) != _first(site, then)).float().mean())
        return {
            "router/flip_rate": torch.stack(rate),
            "router/flip_top1": torch.stack(top1),
            "router/flip_any": torch.stack(anyone),
        }

    def forget(self) -> None:
        """The next run has nothing to compare with: the model went back to an earlier state."""
        self._last = None

    def remove(self) -> None:
        """Takes the hooks off the routers."""
        self._choices.remove()


def _first(site: RouterSite, choice: Choice) -> Tensor:
    """A learned router's first choice is its heaviest; a hash has an order of its own, which never changes."""
    return choice.expert_ids_TK[:, 0] if site.hashed else metrics.first_choice(*choice)
