"""Small models and trainings for the hooks' tests."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import geodiag
from geodiag.hooks.monitor import Monitor
from geodiag.reference_models.config import ModelConfig
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer

VOCAB, SEQUENCE, SEQUENCES = 40, 12, 4


def config(residual: str = "mhc", **changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "vocab": VOCAB,
        "layers": 3,
        "channels": 16,
        "heads": 2,
        "head_dim": 8,
        "sequence": SEQUENCE,
        "experts": 4,
        "expert_dim": 12,
        "residual": residual,
        "streams": 1 if residual == "plain" else 4,
        "alpha_init": 0.5,
    }
    return ModelConfig(**(base | changes))


def trainer(
    residual: str = "mhc", micro_batches: int = 1, seed: int = 0, **changes: Any
) -> Trainer:
    torch.manual_seed(seed)
    train = TrainConfig(
        steps=50, sequences=SEQUENCES, micro_batches=micro_batches, warmup=5, lr=1e-2
    )
    return Trainer(Transformer(config(residual, **changes)), train)


def tokens(step: int) -> Tensor:
    """Batch of a step, (B, S+1): a pure function of the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCAB, (SEQUENCES, SEQUENCE + 1), generator=generator)


def train(t: Trainer, steps: int, monitor: Monitor | None = None, start: int = 0) -> list[float]:
    """Trains on `tokens(step)`; returns the losses bit for bit."""
    losses = []
    for step in range(start, start + steps):
        losses.append(one_step(t, tokens(step), monitor))
    return losses


def one_step(t: Trainer, ids: Tensor, monitor: Monitor | None = None) -> float:
    from geodiag.reference_models.data import Batch

    for part in ids.chunk(t.config.micro_batches):
        t.accumulate(Batch(0, part[:, :-1], part[:, 1:], ("x",) * len(part)))
    done = t.update()
    if monitor is not None:
        monitor.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
    return done.loss.item()


def watch(t: Trainer, path: Path, **options: Any) -> Monitor:
    return geodiag.attach(t.model, t.optimizers, path, quiet=True, **options)


class Blocks(nn.Module):
    """A plain stack of blocks without experts: what geodiag knows nothing special about."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(16, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)
