"""The training step of a reference model: Muon + AdamW, warm-up and decay, clipping, balancing."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geodiag.reference_models.data import Batch
from geodiag.reference_models.moe import HashRouter, loads, nudge_balance
from geodiag.reference_models.muon import StackedMuon
from geodiag.reference_models.transformer import Output, Transformer


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a reference model is trained."""

    steps: int = 300
    sequences: int = 8
    micro_batches: int = 1
    lr: float = 3e-3
    warmup: int = 20
    decay_to: float = 0.1
    """Final learning rate as a share of `lr`, reached by a cosine."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest gradient norm; infinity to leave gradients alone."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is at least 1, not {self.steps}")
        if self.sequences % self.micro_batches:
            raise ValueError(f"{self.sequences} sequences do not make {self.micro_batches} equal micro-batches")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine decay."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.lr * (self.decay_to + (1 - self.decay_to) * 0.5 * (1 + math.cos(math.pi * done)))


class StepResult(NamedTuple):
    """Tensors stay on the device: reading them would make the step wait."""

    loss: Tensor
    grad_norm: Tensor
    lr: float
    tokens: int


def optimizers_of(model: Transformer, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (torch's own for plain ones), AdamW for everything else."""
    flat, stacked, rest = [], [], []
    for name, p in model.named_parameters():
        inside = name.startswith("layers.") and "_hc." not in name and ".router." not in name
        (stacked if inside and p.dim() == 3 else flat if inside and p.dim() == 2 else rest).append(p)
    return [
        torch.optim.Muon(flat, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        StackedMuon(stacked, lr=config.lr, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Trainer:
    """Owns the optimizers; `step(batch)` does one optimizer step."""

    def __init__(self, model: Transformer, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.optimizers = optimizers_of(model, config)
        self.steps_done = 0
        self.before_update: list[Callable[[int], Any]] = []
        """Called with the step's number when gradients are there and nothing has moved yet."""
        self.lr_scale = 1.0

    def step(self, batch: Batch | Sequence[Batch]) -> StepResult:
        """Forward, backward and update on one batch, or on its micro-batches."""
        micro = [batch] if isinstance(batch, Batch) else list(batch)
        losses, load = [], 0
        for part in micro:
            output = self.model(part.token_ids_BS)
            loss = self.model.loss(output, part.targets_BS)
            (loss.total / len(micro)).backward()
            losses.append(loss.token)
            load = load + self._loads(output)
        return self._update(torch.stack(losses).mean(), load, sum(b.token_ids_BS.numel() for b in micro))

    @torch.no_grad()
    def _loads(self, output: Output) -> Tensor:
        return torch.stack([loads(r) for r in output.routings])

    def _update(self, loss: Tensor, load_LE: Any, tokens: int) -> StepResult:
        lr = self.config.lr_at(self.steps_done) * self.lr_scale
        for hook in self.before_update:
            hook(self.steps_done)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        for layer, load in zip(self.model.layers, load_LE, strict=True):
            if not isinstance(layer.moe.router, HashRouter):
                nudge_balance(layer.moe.router, load, self.model.config.balance_speed)
        self.steps_done += 1
        return StepResult(loss, norm, lr, tokens)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps_done = state["steps_done"]
