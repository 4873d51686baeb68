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
"""Beyond it, a step does not fit into float32."""


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
    deterministic: bool = False
    """Whether a GPU computes the same gradients every time; attention's backward does not by
    itself.
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
        """Learning rate of a step: linear warm-up, then cosine decay."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.lr * (
            self.decay_to + (1 - self.decay_to) * 0.5 * (1 + math.cos(math.pi * done))
        )


class StepResult(NamedTuple):
    """Tensors stay on the device: reading them would make the step wait."""

    loss: Tensor
    grad_norm: Tensor
    lr: float
    tokens: int
    domain_B: tuple[str, ...]
    sequence_losses_B: Tensor
    """Mean loss of each of the step's sequences."""


def optimizers_of(model: Transformer, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices (torch's own for plain ones), AdamW for everything else."""
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
    """Forwards are repeatable as they are, but one of them decides which backward follows: cuDNN's
    never is.
    """
    kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kinds) if repeatable else nullcontext()


@contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """Inside, no operation may add up in an order of its own."""
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
    """How far a training is: beside weights and optimizers, all that a resume needs."""

    def __init__(self) -> None:
        self.steps_done = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps_done = state["steps_done"]


class Trainer:
    """Owns the optimizers. A step is `accumulate` of every micro-batch, then `update`.

    Of several ranks each trains on its share of the batch, and `forward` is the model as it is
    called there: inside DDP, say. A model that is sharded is called itself.
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
        """Forward and backward on one micro-batch."""
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
        """Whether all micro-batches of the step are in."""
        return len(self._losses) == self.config.micro_batches

    @property
    def first(self) -> bool:
        """Whether the next micro-batch begins a step."""
        return not self._losses

    def update(self) -> StepResult:
        """Clips, steps the optimizers and balances the routers. ValueError before the step has its
        micro-batches.
        """
        if not self.ready:
            raise ValueError(
                f"the step has {len(self._losses)} of {self.config.micro_batches} micro-batches"
            )
        lr = self.config.lr_at(self.steps_done) * self.lr_scale
        norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        norm = (
            norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        )  # of weights spread over ranks
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
        """One optimizer step on a whole batch."""
        for part in batch.split(self.config.micro_batches):
            self.accumulate(part)
        return self.update()

    def _balance(self) -> None:
        assert self._load_LE is not None, "update() checks that there were micro-batches"
        if dist.is_initialized():  # every rank's tokens count, or the ranks' biases would part
            dist.all_reduce(self._load_LE)
        for block, load_E in zip(self.model.blocks, self._load_LE, strict=True):
            if not isinstance(block.moe.router, HashRouter):
                nudge_balance(block.moe.router, load_E, self.model.config.balance_speed)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs. Save it between steps: micro-batches under way are not in it."""
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
