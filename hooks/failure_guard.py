"""FailureGuard: an error inside geodiag is reported once, and the training goes on.

Every hook, measurement and callback of geodiag that runs inside a training is called through a
guard, because monitoring must not end a training:

    guard.run("gradient norms", read_gradients)                  # None if it fails
    values = guard.run("layers", summarise, {})                  # {} if it fails
    guard.run("layer 3 router", work, retry=False)               # not called again after a failure
    if guard.disabled("layer 3 router"): ...

The guard catches `Exception` only. `KeyboardInterrupt`, `SystemExit` and `CollectiveAborted` (a
failure for which all ranks must end) pass through it.
"""

from collections.abc import Callable
from typing import TypeVar, overload

import torch

T = TypeVar("T")
Report = Callable[[str, Exception], None]
"""Receives the name of what failed and the error. It is called once per name."""


class FailureGuard:
    """Calls work that may fail; reports the first failure of each name to `report`.

    Inside a graph that torch.compile traces, `report` is not called, so that no graph contains
    logging or file access: `flush`, called once a step, reports the failures of graphs.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._reported: set[str] = set()
        self._disabled: set[str] = set()
        self._unreported: list[tuple[str, Exception]] = []
        """Failures inside a traced graph."""

    @overload
    def run(self, name: str, work: Callable[[], T], *, retry: bool = True) -> T | None: ...
    @overload
    def run(self, name: str, work: Callable[[], T], default: T, *, retry: bool = True) -> T: ...

    def run(
        self, name: str, work: Callable[[], T], default: T | None = None, *, retry: bool = True
    ) -> T | None:
        """Return `work()`, or `default` if it raises.

        name: what is recorded, in words for the report. Names are shared by all users of a guard.
        retry: if False, a failure disables `name`: later calls return `default` without `work`.
        """
        if name in self._disabled:
            return default
        try:
            return work()
        except Exception as error:  # monitoring must not end a training
            self.failed(name, error, retry=retry)
            return default

    def failed(self, name: str, error: Exception, *, retry: bool = True) -> None:
        """Report an error that was caught elsewhere, as `run` does."""
        if not retry:
            self._disabled.add(name)
        if torch.compiler.is_compiling():
            self._unreported.append((name, error))
            return
        self._report_once(name, error)

    def disabled(self, name: str) -> bool:
        """True if `name` failed in a call with `retry=False`."""
        return name in self._disabled

    def flush(self) -> None:
        """Report the failures that happened inside traced graphs."""
        while self._unreported:
            self._report_once(*self._unreported.pop(0))

    def _report_once(self, name: str, error: Exception) -> None:
        if name in self._reported:
            return
        self._reported.add(name)
        try:
            self._report(name, error)
        except Exception:  # the report itself failed (closed stderr): nothing is left to report to
            return


def describe(error: BaseException) -> str:
    """Return `TypeError: what is wrong`, the first line of it."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class RaisingGuard(FailureGuard):
    """Raises every failure: for benchmarks and tests, where nothing may fail."""

    def __init__(self) -> None:
        super().__init__(lambda name, error: None)

    def failed(self, name: str, error: Exception, *, retry: bool = True) -> None:
        raise RuntimeError(f"{name}: {error!r}") from error


class FirstFailure:
    """Keeps the first error of several calls, to be raised after all of them.

    On sharded weights every rank takes part in every collective of a forward. An error must
    therefore not leave the forward early: the forward ends first, then the error is raised.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    @overload
    def run(self, work: Callable[[], T]) -> T | None: ...
    @overload
    def run(self, work: Callable[[], T], default: T) -> T: ...

    def run(self, work: Callable[[], T], default: T | None = None) -> T | None:
        """Return `work()`, or `default` if it raises."""
        try:
            return work()
        except Exception as error:  # raised by `raise_if_any`
            self._error = self._error or error
            return default

    def raise_if_any(self) -> None:
        """Raise the first error, if there was one, and forget it."""
        error, self._error = self._error, None
        if error is not None:
            raise error
