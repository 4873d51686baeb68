"""Device buffers that hooks write into: one slot a micro-batch, assigned, never accumulated.

Because a hook only ever assigns, a recomputed forward (activation checkpointing) writes the same
value to the same place, and torch.compile and CUDA graphs see plain copies. The slot's number lives
on the device too, so moving on to the next micro-batch asks nothing of the host.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# M slots (micro-batches), P places (sites, layers, …), T sampled tokens a slot


class Slots:
    """Named float32 buffers of shape (M, P, …), and how they become one step's values.

    Two kinds: one value (or a few) a place, and one value a sampled token and place. A NaN that was
    measured stays a NaN in every reduction; slots and tokens that were not used take no part.
    """

    def __init__(self, device: torch.device, slots: int, sample: int) -> None:
        self.device, self.slots, self.sample_size = device, slots, sample
        self.current = torch.full((1,), -1, dtype=torch.int64, device=device)
        """The slot in use; -1 before the step's first forward."""
        self._begun = 0
        self._buffers: dict[str, Tensor] = {}
        self._indices: dict[int, Tensor] = {}
        self.add("tokens", 1)
        self.add("sampled", 1)

    def add(self, name: str, places: int, *shape: int) -> None:
        """Declares a buffer before the first step."""
        self._buffers[name] = torch.full((self.slots, places, *shape), torch.nan, device=self.device)

    # -- writing, from hooks -----------------------------------------------------------------

    def begin(self) -> None:
        """A forward that will be differentiated begins: the next slot, and room for it where there is none."""
        if not torch.compiler.is_compiling():
            self._begun += 1
            if self._begun > self.slots:
                self._grow()
        self.current.add_(1)

    def _grow(self) -> None:
        """Twice the slots. In a compiled forward, which cannot grow, later micro-batches replace the oldest."""
        for name, buffer in self._buffers.items():
            self._buffers[name] = torch.cat([buffer, torch.full_like(buffer, torch.nan)])
        self.slots *= 2

    def put(self, name: str, place: int, value: Tensor) -> None:
        """Assigns `value` to this micro-batch's slot of a place."""
        target = self._buffers[name].select(1, place)
        value = value.detach().to(torch.float32).reshape(1, *target.shape[1:])
        target.index_copy_(0, self.current.remainder(self.slots), value)

    def put_sample(self, name: str, place: int, value_T: Tensor) -> None:
        """`put` of one value a sampled token; short samples leave the rest unused."""
        short = self.sample_size - len(value_T)
        if short:
            value_T = F.pad(value_T.detach().float(), (0, 0) * (value_T.dim() - 1) + (0, short))
        self.put(name, place, value_T)

    def count_tokens(self, tokens: int) -> None:
        """Says how many tokens this micro-batch has; they weigh the means."""
        self.put("tokens", 0, torch.full((1,), float(tokens), device=self.device))
        self.put("sampled", 0, torch.full((1,), float(min(tokens, self.sample_size)), device=self.device))

    def sample(self, x_T: Tensor) -> Tensor:
        """The sampled tokens of `x`: all of them, or evenly spaced ones, the same in every hook."""
        tokens = len(x_T)
        if tokens <= self.sample_size:
            return x_T
        if tokens not in self._indices:
            self._indices[tokens] = torch.linspace(0, tokens - 1, self.sample_size, device=self.device).long()
        return x_T[self._indices[tokens]]

    # -- reading, at the end of the step -----------------------------------------------------

    def _used(self, dims: int) -> Tensor:
        used = torch.arange(self.slots, device=self.device) <= self.current
        return used.view(-1, *[1] * (dims - 1))

    def sum(self, name: str) -> Tensor:
        """(P, …), added up over micro-batches."""
        buffer = self._buffers[name]
        return torch.where(self._used(buffer.dim()), buffer, 0.0).sum(0)

    def max(self, name: str) -> Tensor:
        """(P, …), largest over micro-batches."""
        buffer = self._buffers[name]
        return torch.where(self._used(buffer.dim()), buffer, -torch.inf).amax(0)

    def mean(self, name: str) -> Tensor:
        """(P, …), mean over micro-batches, weighted by their tokens."""
        buffer = self._buffers[name]
        weight = self._buffers["tokens"].view(-1, *[1] * (buffer.dim() - 1))
        used = self._used(buffer.dim())
        return torch.where(used, buffer * weight, 0.0).sum(0) / torch.where(used, weight, 0.0).sum(0)

    def sampled(self, name: str) -> Tensor:
        """(P, M·T, …): every slot's sampled tokens side by side; `token_mask` says which are real."""
        return self._buffers[name].transpose(0, 1).flatten(1, 2)

    def token_mask(self) -> Tensor:
        """(M·T,) bool: the sampled tokens that this step really has."""
        place = torch.arange(self.sample_size, device=self.device)
        return ((place < self._buffers["sampled"].view(-1, 1)) & self._used(2)).flatten()

    def clear(self) -> None:
        """The step is over: nothing of it may be read as the next step's."""
        self._begun = 0
        self.current.fill_(-1)
        for buffer in self._buffers.values():
            buffer.fill_(torch.nan)
