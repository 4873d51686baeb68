"""The search for the trained model: the called module that holds the optimizers' weights."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from geodiag.hooks import torch_internals

MOST = 0.5
"""A module with less of the optimizers' weights is a part of the model, or another model."""
_TRIED = 8


def trained_weights(optimizers: Iterable[Optimizer]) -> dict[int, Tensor]:
    """Return what the optimizers train, by id."""
    return {id(p): p for o in optimizers for g in o.param_groups for p in g["params"]}


def count_held(module: nn.Module, weights: dict[int, Tensor]) -> int:
    """Return how many elements of the weights belong to the module."""
    return sum(p.numel() for p in module.parameters() if id(p) in weights)


def holds_most(module: nn.Module, optimizers: Sequence[Optimizer]) -> bool:
    """Return whether the module holds at least half of what all the optimizers train."""
    weights = trained_weights(optimizers)
    total = sum(p.numel() for p in weights.values())
    return total > 0 and count_held(module, weights) >= MOST * total


def candidates(modules: Iterable[nn.Module], optimizer: Optimizer) -> list[nn.Module]:
    """Return the modules with some of the optimizer's weights.

    Those with the most weights come first; of equal ones, the outermost.
    """
    weights = trained_weights([optimizer])
    found = [(count_held(m, weights), sum(1 for _ in m.modules()), m) for m in modules]
    found = sorted((f for f in found if f[0]), key=lambda f: f[:2], reverse=True)
    return [m for _, _, m in found[:_TRIED]]


def trains_any(optimizer: Optimizer, weights: set[int]) -> bool:
    """Return whether the optimizer trains any of the weights (ids)."""
    return any(id(p) in weights for g in optimizer.param_groups for p in g["params"])


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside of the wrappers of DDP and torch.compile.

    FSDP stays: it changes the model itself.
    """
    inner: Any = module
    while True:
        outer = inner
        if type(inner).__name__ == "DistributedDataParallel":
            inner = inner.module
        inner = torch_internals.without_compile_wrapper(inner)
        if inner is outer:
            return outer


def steps_taken(optimizers: Iterable[Optimizer]) -> int:
    """Return how many steps the optimizers counted: more than 0 in a resumed training.

    Waits for the device if an optimizer counts there; called once, before recording begins.
    """
    counts = [0]
    for optimizer in optimizers:
        states = (s for s in optimizer.state.values() if isinstance(s, dict) and "step" in s)
        state = next(states, None)
        if state is not None:
            counts.append(int(state["step"]))
    return max(counts)
