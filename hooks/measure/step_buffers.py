"""Step buffers: device memory that hooks write into, one slot a micro-batch.

A hook assigns and never accumulates. So a recomputed forward (activation checkpointing) writes the
same value to the same place, and torch.compile and CUDA graphs capture plain copies. The number of
the slot is on the device too, so the next micro-batch needs nothing from the host.
"""

from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# M slots (micro-batches), P places (sites, layers, …), T sampled tokens a slot

Kind = Literal["sum", "max", "sample"]
"""How micro-batches are reduced: added up, the largest, or kept as one value a sampled token."""


class StepBuffers:
    """Named float32 buffers of shape (M, P, …), and their reduction over a step's micro-batches.

    Buffers of one kind share one storage, so that clearing and reducing them is one operation. A
    measured NaN stays NaN in every reduction; unused slots and tokens take no part.
    """

    def __init__(self, device: torch.device, slots: int, sample: int) -> None:
        self.device, self.slots, self.sample_size = device, slots, sample
        self.current = torch.full((1,), -1, dtype=torch.int64, device=device)
        """The slot in use; -1 before the step's first forward."""
        self._begun = 0
        self._shapes: dict[str, tuple[Kind, tuple[int, ...]]] = {}
        self._storages: dict[Kind, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._indices: dict[int, Tensor] = {}
        self.add("tokens", 1)
        self.add("sampled", 1)

    def add(self, name: str, places: int, *shape: int, kind: Kind = "sum") -> None:
        """Declare a buffer, before any is written. Kind "sample" has one value a sampled token."""
        self._shapes[name] = (
            kind,
            (places, self.sample_size, *shape) if kind == "sample" else (places, *shape),
        )
        self._lay_out()

    def _lay_out(self, kept: dict[Kind, Tensor] | None = None) -> None:
        widths: dict[Kind, int] = {"sum": 0, "max": 0, "sample": 0}
        starts = {}
        for name, (kind, shape) in self._shapes.items():
            starts[name] = widths[kind]
            widths[kind] += prod(shape)
        for kind, width in widths.items():
            storage = torch.full((self.slots, width), torch.nan, device=self.device)
            if kept:
                storage[: len(kept[kind])] = kept[kind]
            self._storages[kind] = storage
        for name, (kind, shape) in self._shapes.items():
            part = self._storages[kind][:, starts[name] : starts[name] + prod(shape)]
            self._buffers[name] = part.unflatten(1, shape)

    # -- writing, from hooks -----------------------------------------------------------------

    def begin(self) -> None:
        """Start the next slot, at the beginning of a forward with gradient."""
        if not torch.compiler.is_compiling():
            self._begun += 1
            if self._begun > self.slots:
                self._grow()
        self.current.add_(1)

    def _grow(self) -> None:
        """Double the slots. In a compiled forward later micro-batches replace the oldest."""
        self.slots *= 2
        self._lay_out(self._storages.copy())

    def buffer(self, name: str) -> Tensor:
        """Return a buffer for `assign`."""
        return self._buffers[name]

    def put(self, name: str, place: int, value: Tensor) -> None:
        """Assign `value` to a place in this micro-batch's slot."""
        assign(self._buffers[name], self.current, place, value)

    def put_all(self, name: str, values_P: Tensor, places: list[int]) -> None:
        """Assign the values of several places, in rising order."""
        buffer = self._buffers[name]
        # A short sample, or a layer with fewer experts than others, is padded with 0.
        missing = [b - v for b, v in zip(buffer.shape[2:], values_P.shape[1:], strict=True)]
        if any(missing):
            values_P = F.pad(values_P, [n for short in reversed(missing) for n in (0, short)])
        if places != list(range(places[0], places[0] + len(places))):
            for place, value in zip(places, values_P.unbind(), strict=True):
                self.put(name, place, value)
            return
        target = buffer[:, places[0] : places[0] + len(places)]
        value = values_P.detach().to(torch.float32).unsqueeze(0)
        target.index_copy_(0, self.current.remainder(self.slots), value)

    def written(self, name: str, places: list[int]) -> Tensor:
        """Return what this micro-batch has written at some places so far, (P, …)."""
        buffer = self._buffers[name].index_select(0, self.current.remainder(self.slots))[0]
        first, last = places[0], places[-1]
        return buffer[first : last + 1] if last - first + 1 == len(places) else buffer[places]

    def count_tokens(self, tokens: int) -> None:
        """Store the number of tokens of this micro-batch, the weight of its means."""
        self.put("tokens", 0, torch.full((1,), float(tokens), device=self.device))
        self.put(
            "sampled", 0, torch.full((1,), float(min(tokens, self.sample_size)), device=self.device)
        )

    def index(self, tokens: int) -> Tensor | None:
        """Return which of so many tokens are sampled, evenly spaced; None for all."""
        if tokens <= self.sample_size:
            return None
        if tokens not in self._indices:
            self._indices[tokens] = torch.linspace(
                0, tokens - 1, self.sample_size, device=self.device
            ).long()
        return self._indices[tokens]

    def sample(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the sampled tokens of `x`."""
        index = self.index(x.shape[dim])
        return x if index is None else x.index_select(dim, index)

    # -- reading, at the end of the step -----------------------------------------------------

    def _used(self) -> Tensor:
        return (torch.arange(self.slots, device=self.device) <= self.current).unsqueeze(1)

    def reduced(self) -> dict[str, Tensor]:
        """Return every buffer of kinds "sum" and "max", reduced over the micro-batches, (P, …)."""
        used, found = self._used(), {}
        whole = {
            "sum": torch.where(used, self._storages["sum"], 0.0).sum(0),
            "max": torch.where(used, self._storages["max"], -torch.inf).amax(0),
        }
        starts = dict.fromkeys(whole, 0)
        for name, (kind, shape) in self._shapes.items():
            if kind != "sample":
                start = starts[kind]
                found[name] = whole[kind][start : start + prod(shape)].view(shape)
                starts[kind] += prod(shape)
        return found

    def sum(self, name: str) -> Tensor:
        """Return one buffer, added up over micro-batches, (P, …)."""
        return torch.where(self._used_like(name), self._buffers[name], 0.0).sum(0)

    def mean(self, name: str) -> Tensor:
        """Return one buffer, mean over micro-batches, weighted by their tokens, (P, …)."""
        used, buffer = self._used_like(name), self._buffers[name]
        weight = self._buffers["tokens"].view(-1, *[1] * (buffer.dim() - 1))
        return torch.where(used, buffer * weight, 0.0).sum(0) / torch.where(used, weight, 0.0).sum(
            0
        )

    def _used_like(self, name: str) -> Tensor:
        return self._used().view(-1, *[1] * (self._buffers[name].dim() - 1))

    def sampled(self, name: str) -> Tensor:
        """Return the sampled tokens of all slots, (P, M·T, …); `token_mask` marks the real ones."""
        return self._buffers[name].transpose(0, 1).flatten(1, 2)

    def token_mask(self) -> Tensor:
        """Return (M·T,) bool: the sampled tokens that this step has."""
        place = torch.arange(self.sample_size, device=self.device)
        return ((place < self._buffers["sampled"].view(-1, 1)) & self._used()).flatten()

    def clear(self) -> None:
        """Forget the step, so that none of its values is recorded as the next step's."""
        self._begun = 0
        self.current.fill_(-1)
        for storage in self._storages.values():
            storage.fill_(torch.nan)


def assign(buffer: Tensor, current: Tensor, place: int, value: Tensor) -> None:
    """Assign `value` to a place of a buffer (M, P, …), in the slot `current`."""
    target = buffer[:, place]
    value = value.detach().to(torch.float32).reshape(1, *target.shape[1:])
    target.index_copy_(0, current.remainder(len(buffer)), value)


def token_mean(values_PT: Tensor, mask_T: Tensor) -> Tensor:
    """Return the mean over the tokens of the mask."""
    return torch.where(mask_T, values_PT, 0.0).sum(-1) / mask_T.sum()


def token_max(values_PT: Tensor, mask_T: Tensor) -> Tensor:
    """Return the largest value of the tokens of the mask."""
    return torch.where(mask_T, values_PT, -torch.inf).amax(-1)
