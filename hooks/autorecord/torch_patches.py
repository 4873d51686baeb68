"""TorchPatches: every function of torch that `geodiag run` replaces, in one table with one `undo`.

torch has hooks for forwards and for the steps of optimizers, but none for what is patched here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import utils
from torch.optim import Optimizer

from geodiag.hooks import torch_internals

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
"""Makes the replacement of a function from the function."""


@dataclass(frozen=True, kw_only=True)
class Wrappers:
    """What each patched function becomes. No replacement may raise an error of its own."""

    optimizer_init: Wrap
    module_compile: Wrap
    backward: Wrap
    scaler_scale: Wrap
    scaler_update: Wrap
    clip_grad_norm: Wrap
    destroy_process_group: Wrap


class TorchPatches:
    """Patches torch from its creation until `undo`.

    The replacements work only while `active`, and not in what torch.compile traces: a script may
    have imported a replaced function by its name, and calls it after `undo` too.
    """

    def __init__(self, wrappers: Wrappers) -> None:
        self.active = True
        self._patched: list[tuple[Any, str, Function, Function]] = []
        self._patch(Optimizer, "__init__", wrappers.optimizer_init)
        self._patch(nn.Module, "compile", wrappers.module_compile)
        self._patch(torch.autograd, "backward", wrappers.backward)
        self._patch(GradScaler, "scale", wrappers.scaler_scale)
        self._patch(GradScaler, "update", wrappers.scaler_update)
        self._patch(utils.clip_grad, "clip_grad_norm_", wrappers.clip_grad_norm)
        self._patch(utils, "clip_grad_norm_", wrappers.clip_grad_norm)
        if dist.is_available():
            self._patch(dist, "destroy_process_group", wrappers.destroy_process_group)

    def _patch(self, owner: Any, name: str, wrap: Wrap) -> None:
        original = getattr(owner, name)
        replacement = wrap(original)

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not self.active:
                return original(*args, **kwargs)
            return replacement(*args, **kwargs)

        setattr(owner, name, patched)
        self._patched.append((owner, name, original, patched))

    def undo(self) -> None:
        """Put every original back; one that was patched again by others stays, without effect."""
        self.active = False
        for owner, name, original, patched in self._patched:
            if getattr(owner, name) is patched:
                setattr(owner, name, original)
        self._patched.clear()


def after_init(callback: Callable[[Optimizer], None]) -> Wrap:
    """Call `callback(optimizer)` after every `Optimizer.__init__`."""

    def wrap(original: Function) -> Function:
        def init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            callback(optimizer)

        return init

    return wrap


def before_compiled_calls(callback: Callable[[nn.Module, Any], None]) -> Wrap:
    """Call `callback(module, args)` before every call of a module compiled by `module.compile()`.

    The hooks of such a module, torch's global ones too, are part of the compiled code.
    """

    def wrap(original: Function) -> Function:
        def compile_in_place(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(module, *args, **kwargs)
            run: Any = torch_internals.compiled_call(module)

            def call(*args: Any, **kwargs: Any) -> Any:
                if not torch.compiler.is_compiling():
                    callback(module, args)
                return run(*args, **kwargs)

            torch_internals.replace_compiled_call(module, call)

        return compile_in_place

    return wrap


def before_groups_are_destroyed(callback: Callable[[], None]) -> Wrap:
    """Call `callback()` before the default process group is destroyed, and all others with it."""

    def wrap(original: Function) -> Function:
        def destroy_process_group(group: Any = None) -> None:
            if group is None or group == dist.group.WORLD:
                callback()
            original(group)

        return destroy_process_group

    return wrap
