"""Tensors put aside for a later step: on their device where there is room, else in pinned host
memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorStash:
    """Several tensors as one flat one, so that each way is a single copy, and nobody waits for it."""

    flat: Tensor
    shapes: tuple[torch.Size, ...]
    device: torch.device

    @classmethod
    def put(cls, tensors: Sequence[Tensor], room: int) -> "TensorStash":
        """Keeps copies of `tensors`; up to `room` bytes stay where they are. Smaller types become
        the widest.
        """
        flat = torch.cat([t.detach().flatten() for t in tensors])
        device = flat.device
        if device.type != "cpu" and flat.nbytes > room:
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=device.type == "cuda")
            # Whoever takes it back asks the same stream for a copy, which therefore comes later
            # than this one.
            flat = host.copy_(flat, non_blocking=True)
        return cls(flat, tuple(t.shape for t in tensors), device)

    def take(self) -> list[Tensor]:
        """The tensors, on the device they came from."""
        flat = self.flat.to(self.device, non_blocking=True)
        pieces = flat.split([s.numel() for s in self.shapes])
        return [p.view(s) for p, s in zip(pieces, self.shapes, strict=True)]

    def on_host(self) -> list[Tensor]:
        """The tensors in host memory, complete; this waits for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        pieces = self.flat.cpu().split([s.numel() for s in self.shapes])
        return [p.view(s).clone() for p, s in zip(pieces, self.shapes, strict=True)]
