"""Data shift: how far a batch's mean input embedding points away from where batches have pointed so
far.

Works at every step, sampled or not, and asks nothing of the host: slots of its own, and a running
mean on the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.measure.forward_hooks import Report
from geodiag.hooks.measure.step_buffers import Slots

REMEMBERED = 20
"""Steps over which the running mean forgets: the embedding itself moves while it is trained."""


class DataShift:
    """Hooks on the model and its embedding; `values` once a step, then `clear`."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        device: torch.device,
        micro_batches: int,
        report: Report,
    ) -> None:
        self._slots = Slots(device, micro_batches, sample=1)
        self._report, self._broken = report, False
        self._mean_C: Tensor | None = None
        self._handles: list[Removable] = []
        embedding = _width(model)
        if layout.watch_input is not None and embedding:
            self._slots.add("embedding", 1, embedding)
            self._handles = [
                model.register_forward_pre_hook(self._begin),
                *layout.watch_input(self._keep),
            ]

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """The step's tokens, and 1 − cosine to the running mean, which then takes this batch in."""
        if not self._handles or self._broken:
            return {}
        batch_C, tokens = self._slots.mean("embedding")[0], self._slots.sum("tokens")
        if self._mean_C is None:
            self._mean_C = batch_C.clone()
            return {"tokens": tokens}
        shift = 1 - torch.nn.functional.cosine_similarity(batch_C, self._mean_C, dim=0)
        # A batch that is not finite is no news of what batches are like.
        taken = torch.where(batch_C.isfinite().all(), batch_C, self._mean_C)
        self._mean_C.lerp_(taken, 1 / REMEMBERED)
        return {"tokens": tokens, "data_shift": shift}

    def state_dict(self) -> dict[str, Any]:
        """Where batches have pointed so far; on the device, so that nobody waits for it."""
        return {"mean": None if self._mean_C is None else self._mean_C.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean_C = None if state["mean"] is None else state["mean"].to(self._slots.device)

    def clear(self) -> None:
        """The step is over."""
        self._slots.clear()

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._slots.begin()

    def _keep(self, view: Callable[[], Tensor]) -> None:
        if not torch.is_grad_enabled() or self._broken:
            return
        try:
            x_TC = view().detach().flatten(0, -2)
            self._slots.count_tokens(len(x_TC))
            self._slots.put("embedding", 0, x_TC.mean(0, dtype=torch.float32))
        except Exception as e:  # monitoring must not end a training: said once, then silent
            self._broken = True
            self._report("data shift", e)


def _width(model: nn.Module) -> int:
    """Of the first embedding, which is that of the tokens; 0 where there is none."""
    return next((m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)), 0)
