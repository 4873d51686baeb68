"""The training step of a reference model: Muon + AdamW, warm-up and decay, clipping, balancing."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from geodiag.reference_models.data import Batch
from geodiag.reference_models.moe import HashRouter, loads, nudge_balance
from geodiag.reference_models.muon import StackedMuon
from geodiag.reference_models.transformer import Output, Transformer

_LARGEST_LR = 1e30
"""With a larger learning rate, an update overflows float32."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the training of a reference model."""

    steps: int = 300
    sequences: int = 8
    micro_batches: int = 1
    lr: float = 3e-3
    warmup: int = 20
    decay_to: float = 0.1
    """Final learning rate as a share of `lr`, reached by a cosine."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest gradient norm; infinity for no clipping."""
    deterministic: bool = False
    """Whether gradients on a GPU repeat bit for bit, which the backward of attention does not by
    default.
    """

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "micro_batches"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        if self.sequences % self.micro_batches:
            fits = ", ".join(
                str(d) for d in range(1, self.sequences + 1) if self.sequences % d == 0
            )
            parts = (
                f"{self.sequences} sequences do not make {self.micro_batches} equal micro-batches"
            )
            raise ValueError(f"{parts}; pass one of {fits}")
        if not 0 <= self.lr <= _LARGEST_LR:
            raise ValueError(f"lr is 0 to {_LARGEST_LR:g}, not {self.lr:g}")
        if self.warmup < 0 or not self.clip > 0:
            raise ValueError(
                f"warmup is 0 or more and clip positive, not {self.warmup}, {self.clip:g}"
            )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine decay."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.lr * (
            self.decay_to + (1 - self.decay_to) * 0.5 * (1 + math.cos(math.pi * done))
        )


class StepResult(NamedTuple):
    """Results of a step. Tensors stay on the device: reading them would wait for the step."""

    loss: Tensor
    grad_norm: Tensor
    lr: float
    tokens: int
    domain_B: tuple[str, ...]
    sequence_losses_B: Tensor
    """Mean loss of each of the step's sequences."""


def optimizers_of(model: Transformer, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices (torch's own for 2-D ones), and AdamW for the rest."""
    flat: list[Tensor] = []
    stacked: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        inside = name.startswith("layers.") and "_hc." not in name and ".router." not in name
        (stacked if inside and p.dim() == 3 else flat if inside and p.dim() == 2 else rest).append(
            p
        )
    return [
        torch.optim.Muon(
            flat, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        StackedMuon(stacked, lr=config.lr, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _attention(repeatable: bool) -> AbstractContextManager[None]:
    """Exclude cuDNN's attention if results must repeat: its backward is not deterministic."""
    kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kinds) if repeatable else nullcontext()


@contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """Allow only deterministic algorithms inside the context."""
    if not wanted:
        yield
        return
    before, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


class Progress:
    """Number of steps done: with weights and optimizers, all that a resume needs."""

    def __init__(self) -> None:
        self.steps_done = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps_done = state["steps_done"]


class Trainer:
    """The training loop's state. A step is `accumulate` for every micro-batch, then `update`.

    Each rank trains on its share of the batch. `forward` is the callable to train, for example the
    model wrapped in DDP; by default the model itself, as for a sharded model.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        forward: Callable[[Tensor], Output] | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.forward = forward or model
        self.optimizers = optimizers_of(model, config)
        self.progress = Progress()
        self.lr_scale = 1.0
        """Factor on the schedule's learning rate."""
        self._losses: list[Tensor] = []
        self._sequence_losses: list[Tensor] = []
        self._domains: tuple[str, ...] = ()
        self._load_LE: Tensor | None = None
        self._tokens = 0

    def accumulate(self, batch: Batch) -> None:
        """Run forward and backward on one micro-batch."""
        with _attention(self.config.deterministic):
            output = self.forward(batch.token_ids_BS)
            loss = self.model.loss(output, batch.targets_BS)
            with _repeatable(self.config.deterministic):
                (loss.total / self.config.micro_batches).backward()
        with torch.no_grad():
            load_LE = torch.stack([loads(r) for r in output.routings])
            self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE
        self._losses.append(loss.token)
        self._sequence_losses.append(loss.per_sequence_B)
        self._domains += batch.domain_B
        self._tokens += batch.token_ids_BS.numel()

    @property
    def steps_done(self) -> int:
        return self.progress.steps_done

    @property
    def ready(self) -> bool:
        """Whether all micro-batches of the step are accumulated."""
        return len(self._losses) == self.config.micro_batches

    @property
    def first(self) -> bool:
        """Whether the next micro-batch begins a step."""
        return not self._losses

    def update(self) -> StepResult:
        """Clip gradients, step the optimizers and balance the routers.

        Raises ValueError before all micro-batches of the step are accumulated.
        """
        if not self.ready:
            raise ValueError(
                f"the step has {len(self._losses)} of {self.config.micro_batches} micro-batches"
            )
        lr = self.config.lr_at(self.steps_done) * self.lr_scale
        norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if hasattr(norm, "full_tensor"):  # of sharded weights
            norm = norm.full_tensor()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        self._balance()
        losses, each = torch.stack(self._losses).mean(), torch.cat(self._sequence_losses)
        result = StepResult(losses, norm, lr, self._tokens, self._domains, each)
        self.progress.steps_done += 1
        self._losses, self._sequence_losses, self._domains = [], [], ()
        self._load_LE, self._tokens = None, 0
        return result

    def step(self, batch: Batch) -> StepResult:
        """Run one optimizer step on a whole batch."""
        for part in batch.split(self.config.micro_batches):
            self.accumulate(part)
        return self.update()

    def _balance(self) -> None:
        assert self._load_LE is not None, "update() checks that there were micro-batches"
        if dist.is_initialized():  # the same load on every rank, or their biases would diverge
            dist.all_reduce(self._load_LE)
        for block, load_E in zip(self.model.blocks, self._load_LE, strict=True):
            if not isinstance(block.moe.router, HashRouter):
                nudge_balance(block.moe.router, load_E, self.model.config.balance_speed)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resume needs. Accumulated micro-batches are not included."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": self.progress.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress.load_state_dict(state["progress"])
