"""Long work on one live line: a training, and what to look at while it runs; or so many pieces of
something.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from geodiag.cli.training import Training
    from geodiag.hooks.record.step_observer import Observation

_ROOM_FOR_TIME, _ROOM_FOR_BAR = 96, 124


def watch(training: "Training") -> None:
    """Runs the training to its end; closes its run whatever happens.

    On a terminal, one live line; elsewhere a line every twentieth of the way. Of several ranks the
    first one speaks.
    """
    status = "failed"
    try:
        if training.place.rank != 0:
            for _ in training.steps():
                pass
        elif sys.stderr.isatty():
            _live(training)
        else:
            _plain(training)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        training.close(status)
        if status == "interrupted" and training.place.rank == 0:
            last, run = training.monitor.last, training.options.run
            kept = f"{last.step + 1} steps, which are kept" if last else "no step"
            print(f"interrupted after {kept}; see geodiag show {run}", file=sys.stderr, flush=True)


def in_words(seen: "Observation | None", mode: str) -> str:
    """`loss 2.31  grad 0.9  gain ×1.00  flips 12 %  routing off`."""
    if seen is None:
        return "waiting for the first step"
    parts = [f"loss {seen.loss:.3f}"]
    if seen.grad_norm is not None:
        parts.append(f"grad {seen.grad_norm:.2f}")
    gains = [v for k, v in seen.worst.items() if k.startswith("composite_gain")]
    if gains:
        parts.append(f"gain ×{max(gains):.3g}")
    flips = [v for k, v in seen.worst.items() if k.startswith("flip")]
    if flips:
        parts.append(f"flips {100 * max(flips):.0f} %")
    if not math.isfinite(seen.loss):
        parts.append("not finite")
    elif seen.verdict.active:
        parts.append("spike")
    return "  ".join([*parts, f"routing {mode}"])


def columns(width: int, total: int) -> "list[ProgressColumn]":
    """The step and what is seen at it; the time left and a bar where the terminal has room for
    them.
    """
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    count = Column(no_wrap=True, min_width=len(f"step {total}/{total}"))
    shown: list[ProgressColumn] = [
        TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=count)
    ]
    shown += [BarColumn(bar_width=24)] if width >= _ROOM_FOR_BAR else []
    shown += [TimeRemainingColumn()] if width >= _ROOM_FOR_TIME else []
    return [
        *shown,
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    ]


def _live(training: "Training") -> None:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*columns(console.width, training.options.steps), console=console) as progress:
        task = progress.add_task("starting", total=training.options.steps)
        for seen in training.steps():
            done = training.trainer.steps_done  # which a rollback sets back
            progress.update(task, completed=done, description=in_words(seen, training.routing.mode))


def _plain(training: "Training") -> None:
    total = training.options.steps
    for seen in training.steps():
        done = training.trainer.steps_done
        if done == total or done % max(total // 20, 1) == 0:
            print(
                f"step {done}/{total}  {in_words(seen, training.routing.mode)}",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def bar(beginning: str) -> "Iterator[Callable[[int, int, str], None]]":
    """A bar that is gone when the work is done, and nothing where nobody looks: `advance(done,
    total, what)`.
    """
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(beginning, total=None)
        yield lambda done, total, what: progress.update(
            task, completed=done, total=total, description=what
        )
