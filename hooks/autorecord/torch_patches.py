"""What a script makes: optimizers, and modules compiled in place. Torch has no hooks for it; these
are wrappers.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def hear_of_optimizers(call: Callable[[Optimizer], None]) -> None:
    """Has every optimizer made from here on shown to `call`, which may not raise."""
    original = Optimizer.__init__

    @functools.wraps(original)
    def init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        call(optimizer)

    Optimizer.__init__ = init  # type: ignore[assignment, method-assign]


def hear_of_compiled_calls(call: Callable[[nn.Module, Any], None]) -> None:
    """Has `call` called before each call of a module on which `compile()` is called from here on;
    it may not raise.

    The hooks of such a module, torch's global ones too, are inside of what is compiled.
    """
    original = nn.Module.compile

    @functools.wraps(original)
    def compile(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(module, *args, **kwargs)
        run: Any = module._compiled_call_impl

        def called(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                call(module, args)
            return run(*args, **kwargs)

        module._compiled_call_impl = called

    nn.Module.compile = compile  # type: ignore[assignment, method-assign]
