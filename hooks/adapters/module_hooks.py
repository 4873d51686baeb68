"""Hooks on a model's modules: watches of inputs and outputs, and scaled outputs for faults."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks import torch_internals
from geodiag.hooks.adapters.base import Removable, Sink, Watch


def on_output(module: nn.Module, read: Callable[[tuple, dict, Any], Any]) -> Watch:
    """Return a watch of a module's forward; `read(args, kwargs, output)` makes the view."""

    def watch(sink: Sink) -> list[Removable]:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            sink(lambda: read(args, kwargs, output))

        return [module.register_forward_hook(hook, with_kwargs=True)]

    return watch


def on_input(module: nn.Module, read: Callable[[tuple, dict], Any]) -> Watch:
    """Return a watch of a module's arguments; `read(args, kwargs)` makes the view."""

    def watch(sink: Sink) -> list[Removable]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            sink(lambda: read(args, kwargs))

        return [module.register_forward_pre_hook(hook, with_kwargs=True)]

    return watch


QUERIES = 64
"""Number of positions whose attention logits are computed."""


def sampled_queries(positions: int, device: torch.device) -> Tensor:
    """Return up to `QUERIES` evenly spaced positions, including the last one."""
    return torch.linspace(0, positions - 1, min(QUERIES, positions), device=device).long()


def output_scaling(
    module: nn.Module, scaled: Callable[[Any, float], Any]
) -> Callable[[float], Removable]:
    """Return a function that scales the module's output by a factor until its handle is removed.

    scaled: (output, factor) → the scaled output.
    """

    def add(factor: float) -> Removable:
        return register_first_hook(module, lambda _m, _a, output: scaled(output, factor))

    return add


def register_first_hook(
    module: nn.Module, hook: Callable[[nn.Module, tuple, Any], Any]
) -> Removable:
    """Register a forward hook that runs before all existing ones."""
    handle = module.register_forward_hook(hook)
    torch_internals.move_last_forward_hook_to_front(module)
    return handle
