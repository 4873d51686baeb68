"""Data shift: the angle between a batch's mean input embedding and its running mean.

Measured at every step, sampled or not, in buffers of its own and without a copy to the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import Layout, Removable
from geodiag.hooks.failure_guard import FailureGuard
from geodiag.hooks.measure.step_buffers import StepBuffers

_NAME = "data shift"
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
        guard: FailureGuard,
    ) -> None:
        self._buffers = StepBuffers(device, micro_batches, sample=1)
        self._guard = guard
        self._mean_C: Tensor | None = None
        self._handles: list[Removable] = []
        embedding = _width(model)
        if layout.watch_input is not None and embedding:
            self._buffers.add("embedding", 1, embedding)
            self._handles = [
                model.register_forward_pre_hook(self._begin),
                *layout.watch_input(self._keep),
            ]

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """Return the step's tokens and 1 − cosine to the running mean, then update the mean."""
        if not self._handles or self._guard.disabled(_NAME):
            return {}
        batch_C, tokens = self._buffers.mean("embedding")[0], self._buffers.sum("tokens")
        if self._mean_C is None:
            self._mean_C = batch_C.clone()
            return {"steps.tokens": tokens}
        shift = 1 - torch.nn.functional.cosine_similarity(batch_C, self._mean_C, dim=0)
        # A batch that is not finite does not enter the mean.
        taken = torch.where(batch_C.isfinite().all(), batch_C, self._mean_C)
        self._mean_C.lerp_(taken, 1 / REMEMBERED)
        return {"steps.tokens": tokens, "steps.data_shift": shift}

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean; it stays on the device, so that the host does not wait."""
        return {"mean": None if self._mean_C is None else self._mean_C.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean_C = None if state["mean"] is None else state["mean"].to(self._buffers.device)

    def clear(self) -> None:
        """Forget the step that ended."""
        self._buffers.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._buffers.begin()

    def _keep(self, view: Callable[[], Tensor]) -> None:
        if torch.is_grad_enabled():
            self._guard.run(_NAME, partial(self._write, view), retry=False)

    def _write(self, view: Callable[[], Tensor]) -> None:
        x_TC = view().detach().flatten(0, -2)
        self._buffers.count_tokens(len(x_TC))
        self._buffers.put("embedding", 0, x_TC.mean(0, dtype=torch.float32))


def _width(model: nn.Module) -> int:
    """Return the width of the first embedding, that of the tokens; 0 if there is none."""
    return next((m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)), 0)
