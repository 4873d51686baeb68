"""A weight that may be spread over ranks: this rank's part of it, and the whole from such a part."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """One weight as it lies between steps: whole, or a DTensor of which this rank has a part."""

    local: Tensor
    like: Any = None
    """The DTensor that it is part of."""

    @classmethod
    def of(cls, weight: Tensor) -> "Shard":
        to_local = getattr(weight, "to_local", None)  # DTensor, without importing torch.distributed
        return cls(weight) if to_local is None else cls(to_local(), weight)

    def whole(self, part: Tensor) -> Tensor:
        """The whole of a weight of which `part` is this rank's; a collective where it is spread over ranks."""
        if self.like is None:
            return part
        spread = type(self.like).from_local(
            part, self.like.device_mesh, self.like.placements, shape=self.like.shape, stride=self.like.stride()
        )
        return spread.full_tensor()
