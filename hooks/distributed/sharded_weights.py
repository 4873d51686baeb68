"""Weights that are spread over ranks: what of them lies here, and the whole of them for as long as
it is needed.

What is a collective says so; the rest asks the other ranks for nothing. A DTensor is told by its
`placements`, and a module that `fully_shard` manages by its class.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

K = TypeVar("K")
V = TypeVar("V")


class CollectiveAborted(BaseException):
    """This rank has left the other ranks alone in collectives that it cannot make up for.

    No Exception: who swallowed it would let the training's next collective meet the one that was
    left.
    """


def is_dtensor(value: Any) -> bool:
    return hasattr(value, "placements") and hasattr(value, "to_local")


def local(value: Any) -> Tensor:
    """What of `value` lies on this rank; all of it where it is not spread."""
    return value.to_local() if is_dtensor(value) else value


def replica_count(value: Any, ranks: int) -> float:
    """On how many of the `ranks` each element of `value` lies. A plain tensor is taken to be alike
    on all of them.
    """
    if not is_dtensor(value):
        return ranks
    mesh = value.device_mesh
    replicas = math.prod(mesh.size(i) for i, p in enumerate(value.placements) if not p.is_shard())
    return replicas * max(ranks // mesh.size(), 1)


def full_value(value: Any) -> Any:
    """A number that may be spread over ranks (a norm, a loss) as a plain tensor. Collective where
    it is spread.
    """
    return value.full_tensor() if is_dtensor(value) else value


def full_from_local(part: Tensor, like: Any) -> Tensor:
    """The whole of what `part` is this rank's part of, spread as `like` is. Collective where that
    is spread.
    """
    if not is_dtensor(like):
        return part
    spread = type(like).from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return spread.full_tensor()


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` or FSDP manages the weights: a forward that it began it must also end."""
    return any(
        c.__name__ in ("FSDPModule", "FullyShardedDataParallel")
        for m in model.modules()
        for c in type(m).__mro__
    )


@contextmanager
def complete_on_all_ranks(model: nn.Module) -> Iterator[None]:
    """Inside, all ranks are in the same collectives of a sharded `model`; CollectiveAborted where this one
    cannot go on.
    """
    try:
        yield
    except Exception as e:
        if not is_sharded(model) or torch.distributed.get_world_size() == 1:
            raise
        line = f"{type(e).__name__}: {e}".splitlines()[0]
        raise CollectiveAborted(
            f"what geodiag runs on sharded weights, all ranks together, failed here ({line})"
        ) from e


def fsdp_modules(module: nn.Module) -> list[Any]:
    """The modules in `module`, itself included, that `fully_shard` gathers and frees."""
    return [m for m in module.modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]


def edit_full(weight: Any, change: Callable[[Tensor], Any]) -> None:
    """`change`s the whole of `weight` in place, wherever it lies. Collective where it is spread
    over ranks.
    """
    if not is_dtensor(weight):
        change(weight)
        return
    from torch.distributed.tensor import distribute_tensor

    all_of_it = weight.full_tensor()
    change(all_of_it)
    weight.to_local().copy_(
        distribute_tensor(all_of_it, weight.device_mesh, weight.placements).to_local()
    )


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of `module` are whole on every rank. Collective where they are spread."""
    parts = fsdp_modules(module)
    with complete_on_all_ranks(module):
        for part in parts:
            part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def for_each_gathered(
    modules: Iterable[tuple[K, nn.Module]], work: Callable[[K], V | None]
) -> dict[K, V]:
    """What `work` makes of each key while its module's weights are whole; None is left out.

    Every rank gathers all of them, whatever it has to do there, and whatever fails: that is raised
    at the end.
    """
    found: dict[K, V] = {}
    failure: Exception | None = None
    for key, module in modules:
        with gathered(module):
            try:
                value = work(key)
            except Exception as e:
                failure = failure or e
                continue
        if value is not None:
            found[key] = value
    if failure is not None:
        raise failure
    return found


def reshard(module: nn.Module) -> None:
    """Frees what a forward without a backward left gathered; between steps everything is spread."""
    for part in fsdp_modules(module):
        part.reshard()
