"""Device timer: seconds of work on the device, read later, so that the host does not wait."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch


class DeviceTimer:
    """Times the block it is entered for; `last` is None before."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began: Any = None
        self.last: Callable[[], float] | None = None
        """Seconds of the last block; call it once the device has finished it."""

    def clear(self) -> None:
        """Forget the last block."""
        self.last = None

    def __enter__(self) -> None:
        self._began = _mark() if self._cuda else time.perf_counter()

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        if self._cuda:
            began, ended = self._began, _mark()
            self.last = lambda: began.elapsed_time(ended) / 1e3
        else:
            seconds = time.perf_counter() - self._began
            self.last = lambda: seconds


def _mark() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
