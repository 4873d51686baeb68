"""Room for one snapshot's tensors in host memory: one flat block, page-locked where they come from
a GPU.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

_ALIGN = 64


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What an arena needs for `tensors`."""
    return sum(_padded(t.numel() * t.element_size()) for t in tensors)


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


class HostBuffer:
    """Copies tensors in, all at once; `tensors` are the copies.

    On a GPU the copy runs on a stream of its own, beside the forward and backward of the next step,
    and `settle` makes the device wait for it where the weights are about to change. MemoryError
    where the host has no room.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        try:
            self._block = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as e:
            raise MemoryError(str(e).splitlines()[0]) from None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self.tensors: list[Tensor] = []
        if self._stream is not None and size:
            _page_lock(self, self._block)

    def fill(self, tensors: list[Tensor], passing: frozenset[int] = frozenset()) -> None:
        """Starts copying. Those whose index is in `passing` may change at once; the others not
        before `settle`.
        """
        self.tensors, start = [], 0
        for t in tensors:
            size = t.numel() * t.element_size()
            self.tensors.append(self._block[start : start + size].view(t.dtype).view(t.shape))
            start += _padded(size)
        if self._stream is None:
            for mine, t in zip(self.tensors, tensors, strict=True):
                mine.copy_(t)
            return
        tensors = [t.clone() if i in passing and t.is_cuda else t for i, t in enumerate(tensors)]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for mine, t in zip(self.tensors, tensors, strict=True):
                mine.copy_(t, non_blocking=True)
                if t.is_cuda:
                    t.record_stream(self._stream)
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)

    def settle(self) -> None:
        """Work of this stream that is queued from here on comes after the copy. The host does not
        wait.
        """
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)

    def wait(self) -> None:
        """The host waits until the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()


def _page_lock(owner: HostBuffer, block: Tensor) -> None:
    """Exactly these bytes, unlike torch's own pinned memory, which comes in powers of two."""
    block.zero_()  # touched by many threads first: locking untouched pages is slow
    cuda = torch.cuda.cudart()
    if int(cuda.cudaHostRegister(block.data_ptr(), block.numel(), 0)) == 0:
        weakref.finalize(owner, cuda.cudaHostUnregister, block.data_ptr())
