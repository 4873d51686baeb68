"""Weights that are sharded over ranks: this rank's part, and the full weights for a short time.

A function that communicates is marked "Collective": every rank must call it. All other functions
are local. A DTensor is recognized by its `placements`, and a module managed by `fully_shard` by
its class name, so that the packages of torch.distributed need not be imported.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from geodiag.hooks.failure_guard import FirstFailure, describe

K = TypeVar("K")
V = TypeVar("V")


class CollectiveAborted(BaseException):
    """This rank left a forward whose collectives the other ranks are still waiting in.

    A BaseException: if it were caught and ignored, the training's next collective on this rank
    would be matched with the abandoned one on the other ranks.
    """


def is_dtensor(value: Any) -> bool:
    return hasattr(value, "placements") and hasattr(value, "to_local")


def local(value: Any) -> Tensor:
    """Return this rank's part of `value`; a plain tensor itself."""
    return value.to_local() if is_dtensor(value) else value


def replica_count(value: Any, ranks: int) -> float:
    """Return how many of the `ranks` hold each element of `value`.

    A plain tensor is assumed to be replicated on all of them.
    """
    if not is_dtensor(value):
        return ranks
    mesh = value.device_mesh
    replicas = math.prod(mesh.size(i) for i, p in enumerate(value.placements) if not p.is_shard())
    return replicas * max(ranks // mesh.size(), 1)


def full_value(value: Any) -> Any:
    """Return a number that may be a DTensor (a norm, a loss) as a plain tensor.

    Collective for a DTensor.
    """
    return value.full_tensor() if is_dtensor(value) else value


def full_from_local(part: Tensor, like: Any) -> Tensor:
    """Return the full tensor of which `part` is this rank's part, sharded like `like`.

    Collective if `like` is a DTensor.
    """
    if not is_dtensor(like):
        return part
    dtensor = type(like).from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return dtensor.full_tensor()


def is_sharded(model: nn.Module) -> bool:
    """Return whether `fully_shard` or FSDP manages weights of `model`.

    A forward of such a model must run to its end once it has begun, because it is collective.
    """
    return any(
        c.__name__ in ("FSDPModule", "FullyShardedDataParallel")
        for m in model.modules()
        for c in type(m).__mro__
    )


def fsdp_modules(module: nn.Module) -> list[Any]:
    """Return the modules in `module`, itself included, that `fully_shard` gathers and frees."""
    return [m for m in module.modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]


@contextmanager
def complete_on_all_ranks(model: nn.Module) -> Iterator[None]:
    """Context for a forward of `model` that all ranks run together.

    An error on one rank of a sharded model becomes CollectiveAborted.
    """
    try:
        yield
    except Exception as e:
        if not is_sharded(model) or torch.distributed.get_world_size() == 1:
            raise
        line = describe(e)
        raise CollectiveAborted(
            f"what geodiag runs on sharded weights, all ranks together, failed here ({line})"
        ) from e


def edit_full(weight: Any, change: Callable[[Tensor], Any]) -> None:
    """Apply `change` in place to the full `weight`. Collective if `weight` is a DTensor."""
    if not is_dtensor(weight):
        change(weight)
        return
    from torch.distributed.tensor import distribute_tensor

    # Every rank changes its own copy of the full weight alike and keeps its part of the result.
    full = weight.full_tensor()
    change(full)
    part = distribute_tensor(full, weight.device_mesh, weight.placements).to_local()
    weight.to_local().copy_(part)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Context in which every rank holds the full weights of `module`. Collective if sharded."""
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
    """Return `work(key)` for each key, called while its module's weights are gathered.

    Results that are None are left out. Every rank gathers all modules, even if its `work` fails,
    since the other ranks gather them too; the first error is raised at the end.
    """
    results: dict[K, V] = {}
    failures = FirstFailure()
    for key, module in modules:
        with gathered(module):
            result = failures.run(partial(work, key))
        if result is not None:
            results[key] = result
    failures.raise_if_any()
    return results


def reshard(module: nn.Module) -> None:
    """Free full weights that a forward without a backward left gathered."""
    for part in fsdp_modules(module):
        part.reshard()
