"""A kernel as an operation of torch, with its gradient, and opaque to torch.compile.

Plain tensors call the kernel through an autograd function: torch's dispatcher would need as much
time in Python as a small kernel needs on the GPU. Under torch.compile, and for fake tensors and
other subclasses, the call goes to the registered operator, which a compiler does not trace into.
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
    """Register `geodiag::name` and return a function that calls it. Its first argument is a tensor.

    `forward` computes the results, `fake` returns tensors of the same shapes without values.
    `keep(ctx, inputs, outputs)` saves for the backward, and `grad(ctx, *gradients)` is the
    backward, which cannot be differentiated again. Without both, there is no gradient.
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
