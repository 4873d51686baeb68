"""Tensors that are spread over ranks (DTensor), handled without asking the other ranks for anything.

A DTensor is told by its `placements`: torch.distributed.tensor takes a second to import, and is there already
wherever a DTensor is.
"""

import math
from typing import Any

from torch import Tensor


def is_spread(value: Any) -> bool:
    return hasattr(value, "placements") and hasattr(value, "to_local")


def local(value: Any) -> Tensor:
    """What of `value` lies on this rank; all of it where it is not spread."""
    return value.to_local() if is_spread(value) else value


def copies(value: Any, ranks: int) -> float:
    """On how many of the `ranks` each element of `value` lies. A plain tensor is taken to be alike on all of them."""
    if not is_spread(value):
        return ranks
    mesh = value.device_mesh
    replicas = math.prod(mesh.size(i) for i, p in enumerate(value.placements) if not p.is_shard())
    return replicas * max(ranks // mesh.size(), 1)


def whole(value: Any) -> Any:
    """A number that may be spread over ranks (a norm, a loss) as a plain tensor. Collective where it is spread."""
    return value.full_tensor() if is_spread(value) else value


def own_matrices(weight: Any) -> Tensor | None:
    """Of a stack (E, rows, columns) the matrices that lie whole on this rank; None where none does."""
    if not is_spread(weight):
        return weight
    if any(p.is_shard() and not p.is_shard(0) for p in weight.placements):
        return None
    mine = weight.to_local()
    return mine if len(mine) else None
