"""What the hooks of one forward saw, kept until it can be reduced for all places at once.

Launching is what measuring costs on a GPU: a few operations on stacked tensors, instead of a few at
every place.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Pending:
    """Tuples of tensors by kind and place. A place that is seen again replaces what it had."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[int, tuple]] = {}

    def add(self, kind: str, place: int, seen: tuple) -> None:
        self._seen.setdefault(kind, {})[place] = seen

    def take(self, kind: str) -> dict[int, tuple]:
        """Everything of a kind, which is then forgotten."""
        return self._seen.pop(kind, {})

    def clear(self) -> None:
        self._seen.clear()


def alike(
    seen: dict[int, Any], more: Callable[[int], Hashable] = lambda _: None
) -> Iterator[tuple[list[int], Any]]:
    """Places whose tensors have the same shapes, and whatever else `more` says, with their tensors
    stacked.

    (Not all places of a model need have the same number of experts, or show the same things.)
    """
    groups: dict[Hashable, list[int]] = {}
    for place in sorted(seen):
        groups.setdefault((_shapes(seen[place]), more(place)), []).append(place)
    for places in groups.values():
        yield places, stacked([seen[p] for p in places])


def stacked(seen: Sequence[Any]) -> Any:
    """Tuples of tensors, and of what else is the same in all, as one tuple of stacked tensors.

    Named tuples within the tuples are stacked in the same way.
    """
    fields = [_stacked_field(values) for values in zip(*seen, strict=True)]
    return type(seen[0])(*fields) if hasattr(seen[0], "_fields") else tuple(fields)


def _stacked_field(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    return stacked(values) if hasattr(values[0], "_fields") else values[0]


def _shapes(seen: tuple) -> Hashable:
    return tuple(_shape(value) for value in seen)


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    return _shapes(value) if hasattr(value, "_fields") else value
