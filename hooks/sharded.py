"""Weights that are spread over ranks: what of them lies here, and the whole of them for as long as it is needed.

What is a collective says so; the rest asks the other ranks for nothing. A DTensor is told by its `placements`, and a
module that `fully_shard` manages by its class: torch.distributed takes a second to import, and is there already
wherever one of these is.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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


def managed(module: nn.Module) -> list[Any]:
    """The modules in `module`, itself included, that `fully_shard` gathers and frees."""
    return [m for m in module.modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]


def edit(weight: Any, change: Callable[[Tensor], Any]) -> None:
    """`change`s the whole of `weight` in place, wherever it lies. Collective where it is spread over ranks."""
    if not is_spread(weight):
        change(weight)
        return
    from torch.distributed.tensor import distribute_tensor

    all_of_it = weight.full_tensor()
    change(all_of_it)
    weight.to_local().copy_(distribute_tensor(all_of_it, weight.device_mesh, weight.placements).to_local())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of `module` are whole on every rank. Collective where they are spread."""
    parts = managed(module)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def free(module: nn.Module) -> None:
    """Frees what a forward without a backward left gathered; between steps everything is spread."""
    for part in managed(module):
        part.reshard()
