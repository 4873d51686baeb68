"""Every private name of torch that geodiag uses, one function each, with the reason.

All of them were tried on torch 2.11 and 2.13. No other file of hooks/ uses a private name of torch
(a test checks it), so a new version of torch is tried with tests/hooks/test_torch_internals.py: one
test for each name, which fails if torch renames it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler


def in_backward() -> bool:
    """Return whether this thread is inside a backward.

    `torch._C._current_graph_task_id`: a checkpoint runs forwards, and backwards of its own, inside
    the backward of the training. torch has no public way to recognise them.
    """
    return torch._C._current_graph_task_id() != -1


# -- compiled modules ----------------------------------------------------------------------


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled in place or wrapped by `torch.compile`.

    Compiled code does not run hooks that are registered later.
    """
    return compiled_call(module) is not None or _is_optimized(module)


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """Return what a call of a module runs after `module.compile()`; None if it is not compiled.

    `nn.Module._compiled_call_impl`: torch has no public way to ask it.
    """
    call: Callable[..., Any] | None = module._compiled_call_impl
    return call


def replace_compiled_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Replace what a call of a compiled module runs.

    `nn.Module._compiled_call_impl`: hooks of such a module are part of the compiled code, so that
    only a wrapper of the whole call runs before it.
    """
    module._compiled_call_impl = call


def without_compile_wrapper(module: nn.Module) -> nn.Module:
    """Return the module itself if `torch.compile(module)` wrapped it, else `module`.

    `OptimizedModule._orig_mod`: torch has no public way back to the module.
    """
    return module._orig_mod if _is_optimized(module) else module  # type: ignore[return-value]


def _is_optimized(module: nn.Module) -> bool:
    # By its name: importing the class imports the compiler, half a second in every process.
    return type(module).__name__ == "OptimizedModule"


# -- hooks and buffers of modules ----------------------------------------------------------


def move_last_forward_hook_to_front(module: nn.Module) -> None:
    """Make the forward hook that was registered last the first one.

    `nn.Module._forward_hooks`: `register_forward_hook(prepend=True)` changes the order of the calls
    and not the order of the dictionary. torch.compile before 2.13 counts in the latter, and takes
    one hook's variables for another's. Here both orders are the same.
    """
    hooks = module._forward_hooks
    for key in list(hooks)[:-1]:
        hooks[key] = hooks.pop(key)


def forward_pre_hooks(module: nn.Module) -> dict[int, tuple[Callable[..., Any], bool]]:
    """Return a module's forward pre-hooks by id, each with whether it takes keyword arguments.

    `nn.Module._forward_pre_hooks`, `_forward_pre_hooks_with_kwargs`: hooks registered while
    the module is being called do not run in that call, unless they are called by hand.
    """
    takes_kwargs = module._forward_pre_hooks_with_kwargs
    return {key: (hook, key in takes_kwargs) for key, hook in module._forward_pre_hooks.items()}


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers of a module itself, by name; writing to the dictionary replaces a buffer.

    `nn.Module._buffers`: a forward may replace a buffer, and `register_buffer` refuses a name that
    is taken.
    """
    return module._buffers


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place.

    `Tensor._version`: tells a changed buffer from an unchanged one without comparing the values.
    """
    return tensor._version


# -- many tensors at once ------------------------------------------------------------------


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[Tensor]:
    """Return the norm of each tensor, in a few kernels for all of them.

    `torch._foreach_norm`: one kernel a parameter would cost more than the step of a small model.
    """
    return list(torch._foreach_norm(list(tensors), order))


def subtract_all(minuends: Sequence[Tensor], subtrahends: Sequence[Tensor]) -> list[Tensor]:
    """Return the difference of each pair, in a few kernels for all. `torch._foreach_sub`."""
    return list(torch._foreach_sub(list(minuends), list(subtrahends)))


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, with a few kernels in all: `torch._foreach_copy_`."""
    torch._foreach_copy_(list(targets), list(sources))


# -- training ------------------------------------------------------------------------------


def loss_scale(scaler: GradScaler) -> Tensor | None:
    """Return a GradScaler's factor on its device; None before its first use.

    `GradScaler._scale`: the public `get_scale` waits for the device.
    """
    return scaler._scale


def default_store() -> "dist.Store":
    """Return the key-value store of the default process group.

    `distributed_c10d._get_default_store`: ranks that may not all take part cannot use a collective.
    """
    return dist.distributed_c10d._get_default_store()
