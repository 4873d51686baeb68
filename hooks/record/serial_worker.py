"""One thread that runs submitted work in order.

A daemon thread rather than a `concurrent.futures` executor: an executor refuses work once the
interpreter begins to shut down, before the functions registered with `atexit` run, and a run that
the training script did not close is closed in one of those.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """Runs what is submitted, one item after another, on one thread."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Run `work` after everything submitted before it. The future has its result or error."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # raised by `Future.result` in the caller's thread
                done.set_exception(error)

        self._work.put(run)
        return done

    def stop(self) -> None:
        """Finish what was submitted and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
