"""ClipListener: the gradient norm before clipping, where the script computes it anyway."""

from collections import deque
from collections.abc import Callable, Set
from typing import Any

from torch import Tensor

_KEPT = 8
"""Calls kept for one step; of older ones the norm is forgotten, if no step takes it."""


class ClipListener:
    """Keeps what `torch.nn.utils.clip_grad_norm_` returned; `take` it once a step."""

    def __init__(self) -> None:
        self._norms: deque[tuple[frozenset[int], Tensor]] = deque(maxlen=_KEPT)

    def wrap(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `clip_grad_norm_` with each 2-norm kept."""

        def clip_grad_norm_(
            parameters: Any, max_norm: float, norm_type: float = 2.0, *args: Any, **kwargs: Any
        ) -> Tensor:
            # As a list, because a generator can be read once only.
            given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            norm = original(given, max_norm, norm_type, *args, **kwargs)
            if norm_type == 2.0:
                self._norms.append((frozenset(id(p) for p in given), norm))
            return norm

        return clip_grad_norm_

    def take(self, weights: Set[int]) -> Tensor | None:
        """Return the norm of the gradient of all `weights` (ids) since the last call.

        None if the script did not compute it exactly once.
        """
        complete = [norm for ids, norm in self._norms if ids >= weights]
        self._norms.clear()
        return complete[0] if len(complete) == 1 else None
