"""Work on a stream of its own: beside the training step, and through before an optimizer changes a weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class SideStream:
    """On a GPU, what is `opened` is enqueued beside the stream that is current; elsewhere it just runs.

    Whoever uses what was made there calls `join` first. Optimizers are held back by themselves; whoever changes
    weights without a torch optimizer calls `join` too.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._through: Any = None
        self._handle = register_optimizer_step_pre_hook(lambda *_: self.join()) if self._stream else None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Behind everything that is enqueued now, and beside what comes next."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._through = self._stream.record_event()

    def join(self) -> None:
        """What is enqueued from now on comes after the work in here. Waits for nothing on the host."""
        if self._through is not None:
            torch.cuda.current_stream().wait_event(self._through)
            self._through = None

    def lend(self, tensor: Tensor) -> Tensor:
        """A tensor that was made in here and is used on the current stream: its memory is not given away too early."""
        if self._stream is not None:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor

    def remove(self) -> None:
        self.join()
        if self._handle is not None:
            self._handle.remove()
