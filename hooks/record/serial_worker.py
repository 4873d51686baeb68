"""One daemon thread that does things in order.

concurrent.futures refuses work once the interpreter begins to end, before `atexit` runs, and a
training that never called `close` must still be closed there.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """`submit` work, in order, to one thread."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Does `work` after everything submitted before it; the future has its result or its
        exception.
        """
        done: Future[T] = Future()

        def do() -> None:
            try:
                done.set_result(work())
            except BaseException as e:  # carried to whoever asks for the result
                done.set_exception(e)

        self._work.put(do)
        return done

    def stop(self) -> None:
        """Finishes what was submitted and ends the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
