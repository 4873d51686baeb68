"""One flat buffer in host memory for the tensors of one snapshot; page-locked for a GPU."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

_ALIGN = 64
"""Bytes; every tensor starts at a multiple, which suits every dtype."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the size of a buffer for `tensors`."""
    return sum(_padded(t.numel() * t.element_size()) for t in tensors)


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


class HostBuffer:
    """Copies tensors to host memory; `tensors` are the copies.

    On a GPU the copy runs on its own stream, in parallel with the forward and backward of the next
    step. `order_after_copy` then makes the device wait for the copy before weights change.
    MemoryError if the host has too little memory.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device
        try:
            self._block = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as e:
            raise MemoryError(str(e).splitlines()[0]) from None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self.tensors: list[Tensor] = []
        if self._stream is not None and size:
            _page_lock(self, self._block)

    def fill(self, tensors: list[Tensor], volatile: frozenset[int] = frozenset()) -> None:
        """Start copying `tensors`.

        volatile: indices of tensors that may change at once. All others must not change before
        `order_after_copy`.
        """
        self.tensors = self._views_like(tensors)
        if self._stream is None:
            for copy, t in zip(self.tensors, tensors, strict=True):
                copy.copy_(t)
            return

        # A volatile tensor (a module's buffer) may change in the next forward, before the copy
        # stream reaches it. Its clone is made on the training's own stream, before that forward.
        tensors = [t.clone() if i in volatile and t.is_cuda else t for i, t in enumerate(tensors)]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for copy, t in zip(self.tensors, tensors, strict=True):
                copy.copy_(t, non_blocking=True)
                if t.is_cuda:
                    t.record_stream(self._stream)  # its memory is not reused before the copy
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)

    def _views_like(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return views of the block with the shapes and dtypes of `tensors`."""
        views = []
        start = 0
        for t in tensors:
            size = t.numel() * t.element_size()
            views.append(self._block[start : start + size].view(t.dtype).view(t.shape))
            start += _padded(size)
        return views

    def order_after_copy(self) -> None:
        """Make later work on the current stream wait for the copy. The host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)

    def wait(self) -> None:
        """Block the host until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()


def _page_lock(owner: HostBuffer, block: Tensor) -> None:
    """Page-lock exactly the block, until `owner` is freed.

    torch's own pinned memory is rounded up to a power of two, which for a snapshot can be twice the
    size.
    """
    block.zero_()  # in many threads; locking pages that were never touched is slow
    cuda = torch.cuda.cudart()
    if int(cuda.cudaHostRegister(block.data_ptr(), block.numel(), 0)) == 0:
        weakref.finalize(owner, cuda.cudaHostUnregister, block.data_ptr())
