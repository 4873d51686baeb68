"""What a training clips: the norm of its whole gradient before that, where the script has it
computed anyway.
"""

import functools
from collections import deque
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils

_NAME = "clip_grad_norm_"
_KEPT = 8
"""Calls in one step; a process in which nothing is recorded keeps no more either."""


class Norms:
    """A thin wrapper of `torch.nn.utils.clip_grad_norm_`; `take` what it found, once a step."""

    def __init__(self) -> None:
        self._found: deque[tuple[frozenset[int], Tensor]] = deque(maxlen=_KEPT)
        wrapper = self._wrapped(utils.clip_grad.clip_grad_norm_)
        for module in (utils, utils.clip_grad):
            setattr(module, _NAME, wrapper)

    def _wrapped(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def clip_grad_norm_(
            parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any
        ) -> Tensor:
            if torch.compiler.is_compiling():
                return original(parameters, max_norm, norm_type, *args, **kwargs)
            given = (
                [parameters] if isinstance(parameters, Tensor) else list(parameters)
            )  # a generator is read once
            norm = original(given, max_norm, norm_type, *args, **kwargs)
            if norm_type == 2.0:
                self._found.append((frozenset(id(p) for p in given), norm))
            return norm

        return clip_grad_norm_

    def take(self, weights: Set[int]) -> Tensor | None:
        """The norm of the gradient of all the `weights`; None where it was not asked for once since
        the last step.
        """
        whole = [norm for ids, norm in self._found if ids >= weights]
        self._found.clear()
        return whole[0] if len(whole) == 1 else None
