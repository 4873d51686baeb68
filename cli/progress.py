"""A training on one live line: what to look at while it runs."""

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geodiag.cli.loop import Training
    from geodiag.hooks.observer import Observation


def watch(training: "Training") -> None:
    """Runs the training to its end; closes its run whatever happens.

    On a terminal, one live line; elsewhere a line every twentieth of the way. Of several ranks the first one speaks.
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


def _live(training: "Training") -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    ]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=training.options.steps)
        for seen in training.steps():
            done = training.trainer.steps_done  # which a rollback sets back
            progress.update(task, completed=done, description=in_words(seen, training.routing.mode))


def _plain(training: "Training") -> None:
    total = training.options.steps
    for seen in training.steps():
        done = training.trainer.steps_done
        if done == total or done % max(total // 20, 1) == 0:
            print(f"step {done}/{total}  {in_words(seen, training.routing.mode)}", file=sys.stderr, flush=True)
