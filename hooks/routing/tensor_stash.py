"""Copies of tensors for a later step: on their device while memory lasts, else in pinned memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorStash:
    """Tensors packed into one flat tensor, so that each direction is one asynchronous copy."""

    flat: Tensor
    shapes: tuple[torch.Size, ...]
    device: torch.device

    @classmethod
    def put(cls, tensors: Sequence[Tensor], device_bytes: int) -> "TensorStash":
        """Copy `tensors`; up to `device_bytes` stay on the device, more go to pinned host memory.

        Tensors of several dtypes are promoted to the widest of them.
        """
        flat = torch.cat([t.detach().flatten() for t in tensors])
        device = flat.device
        if device.type != "cpu" and flat.nbytes > device_bytes:
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=device.type == "cuda")
            # No synchronization is needed: `take` queues its copy on the same stream, and so it
            # runs after this one.
            flat = host.copy_(flat, non_blocking=True)
        return cls(flat, tuple(t.shape for t in tensors), device)

    def take(self) -> list[Tensor]:
        """Return the tensors on their original device."""
        return self._unpacked(self.flat.to(self.device, non_blocking=True))

    def on_host(self) -> list[Tensor]:
        """Return copies of the tensors in host memory. Waits for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return [piece.clone() for piece in self._unpacked(self.flat.cpu())]

    def _unpacked(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
