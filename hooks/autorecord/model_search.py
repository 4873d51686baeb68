"""The search for the model that is trained: the module, as it is called, that holds the optimizers'
weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

MOST = 0.5
"""A module with less of the optimizers' weights is a part of the model, or another model."""
_TRIED = 8


def weights_of(optimizers: Iterable[Optimizer]) -> dict[int, Tensor]:
    """What the optimizers train, by identity."""
    return {id(p): p for o in optimizers for g in o.param_groups for p in g["params"]}


def held(module: nn.Module, weights: dict[int, Tensor]) -> int:
    """How many elements of the weights are this module's."""
    return sum(p.numel() for p in module.parameters() if id(p) in weights)


def holds_most(module: nn.Module, optimizers: Sequence[Optimizer]) -> bool:
    """Whether the module holds at least half of what all the optimizers train."""
    weights = weights_of(optimizers)
    whole = sum(p.numel() for p in weights.values())
    return whole > 0 and held(module, weights) >= MOST * whole


def best(modules: Iterable[nn.Module], optimizer: Optimizer) -> list[nn.Module]:
    """Of the modules those that hold some of the optimizer's weights: the most first, of alike ones
    the outermost.
    """
    weights = weights_of([optimizer])
    found = [(held(m, weights), sum(1 for _ in m.modules()), m) for m in modules]
    found = sorted((f for f in found if f[0]), key=lambda f: f[:2], reverse=True)
    return [m for _, _, m in found[:_TRIED]]


def belongs(optimizer: Optimizer, weights: set[int]) -> bool:
    """Whether the optimizer trains any of the weights."""
    return any(id(p) in weights for g in optimizer.param_groups for p in g["params"])


def unwrapped(module: nn.Module) -> nn.Module:
    """The model itself, out of DDP's and torch.compile's wrappers; what shards weights is no
    wrapper.
    """
    inner: Any = module
    while True:
        name = type(inner).__name__
        if name == "OptimizedModule":
            inner = inner._orig_mod
        elif name == "DistributedDataParallel":
            inner = inner.module
        else:
            return inner


def steps_taken(optimizers: Iterable[Optimizer]) -> int:
    """How many steps the optimizers say they took: not none where a training resumes from a
    checkpoint.

    Asks the device where an optimizer counts there; before anything is recorded, and only of a
    resumed training.
    """
    counts = [0]
    for optimizer in optimizers:
        state = next(
            (s for s in optimizer.state.values() if isinstance(s, dict) and "step" in s), None
        )
        if state is not None:
            counts.append(int(state["step"]))
    return max(counts)
