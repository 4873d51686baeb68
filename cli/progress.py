"""Progress of long work: a live line on a terminal, plain lines elsewhere."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from geodiag.cli.training import Training
    from geodiag.hooks.record.step_observer import Observation

_MIN_WIDTH_FOR_TIME = 96
_MIN_WIDTH_FOR_BAR = 124


def watch(training: "Training") -> None:
    """Run the training to its end and close its run, also after an error.

    Prints one live line on a terminal, elsewhere a line for every twentieth of the steps. Only
    rank 0 prints.
    """
    status = "failed"
    try:
        if training.rank_info.rank != 0:
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
        if status == "interrupted" and training.rank_info.rank == 0:
            last = training.monitor.last
            kept = f"{last.step + 1} steps, which are kept" if last else "no step"
            line = f"interrupted after {kept}; see geodiag show {training.options.run}"
            print(line, file=sys.stderr, flush=True)


def describe(observation: "Observation | None", mode: str) -> str:
    """Return e.g. `loss 2.31  grad 0.9  gain ×1.00  flips 12 %  routing off`."""
    if observation is None:
        return "waiting for the first step"
    parts = [f"loss {observation.loss:.3f}"]
    if observation.grad_norm is not None:
        parts.append(f"grad {observation.grad_norm:.2f}")
    gains = [v for k, v in observation.worst.items() if k.startswith("composite_gain")]
    if gains:
        parts.append(f"gain ×{max(gains):.3g}")
    flips = [v for k, v in observation.worst.items() if k.startswith("flip")]
    if flips:
        parts.append(f"flips {100 * max(flips):.0f} %")
    if not math.isfinite(observation.loss):
        parts.append("not finite")
    elif observation.verdict.active:
        parts.append("spike")
    return "  ".join([*parts, f"routing {mode}"])


def columns(width: int, total: int) -> "list[ProgressColumn]":
    """Return the columns of the live line; wide terminals also show the time left and a bar."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    count = Column(no_wrap=True, min_width=len(f"step {total}/{total}"))
    shown: list[ProgressColumn] = [
        TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=count)
    ]
    if width >= _MIN_WIDTH_FOR_BAR:
        shown.append(BarColumn(bar_width=24))
    if width >= _MIN_WIDTH_FOR_TIME:
        shown.append(TimeRemainingColumn())
    description = Column(no_wrap=True, overflow="ellipsis")
    shown.append(TextColumn("{task.description}", table_column=description))
    return shown


def _live(training: "Training") -> None:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*columns(console.width, training.options.steps), console=console) as progress:
        task = progress.add_task("starting", total=training.options.steps)
        for observation in training.steps():
            done = training.trainer.steps_done  # a rollback makes it smaller
            progress.update(
                task, completed=done, description=describe(observation, training.routing.mode)
            )


def _plain(training: "Training") -> None:
    total = training.options.steps
    for observation in training.steps():
        done = training.trainer.steps_done
        if done == total or done % max(total // 20, 1) == 0:
            line = f"step {done}/{total}  {describe(observation, training.routing.mode)}"
            print(line, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(title: str) -> "Iterator[Callable[[int, int, str], None]]":
    """Show a bar on a terminal during the `with` block; yield `advance(done, total, title)`."""
    if not sys.stderr.isatty():
        yield lambda done, total, title: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total, title: progress.update(
            task, completed=done, total=total, description=title
        )
