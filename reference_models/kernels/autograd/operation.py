"""A kernel as an operation of torch: with its gradient, and whole under torch.compile.

Plain tensors go to it straight, through an autograd function: torch's dispatcher would take as long
to call it in Python as a small GPU to run it. Everything else (what is being compiled, fake
tensors) goes through the registered operator, which nothing looks into.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def operation(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    grad: Callable[..., tuple[Tensor | None, ...]] | None = None,
) -> Callable[..., Any]:
    """`geodiag::name`, which `forward` computes, of a tensor first; `fake` gives its results
    without their values.

    `keep(ctx, inputs, outputs)` and `grad(ctx, *gradients)` make it differentiable, once; without
    them it is not.
    """
    registered = torch.library.custom_op(f"geodiag::{name}", forward, mutates_args=())
    registered.register_fake(fake)
    straight = forward
    if keep is not None and grad is not None:
        registered.register_autograd(grad, setup_context=keep)
        straight = _function(name, forward, keep, grad).apply

    def call(first: Tensor, *rest: Any) -> Any:
        plain = type(first) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
        return (straight if plain else registered)(first, *rest)

    return call


def _function(
    name: str, forward: Callable[..., Any], keep: Callable[..., None], grad: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def run(ctx: Any, *inputs: Any) -> Any:
        outputs = forward(*inputs)
        keep(ctx, inputs, outputs)
        return outputs

    members = {"forward": staticmethod(run), "backward": staticmethod(once_differentiable(grad))}
    return type(name, (torch.autograd.Function,), members)
