"""`geodiag demo`: the whole story on one machine in two minutes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from geodiag.run import Run

FAULT_STEP = 150
FAULT = f"lr-shock@{FAULT_STEP}=30"
STEPS = 240

_INTRODUCTION = (
    f"geodiag demo: {STEPS} steps of a small mixture-of-experts model with hyper-connections on real text: the source "
    f"of this Python's own library. At step {FAULT_STEP} the learning rate becomes 30 times too large for ten steps, a "
    "real fault in a real training. Nobody tells the detector or the controller. When they find it, training goes back "
    "to a snapshot from before it and takes the same batches again, routed by older weights and at half the learning "
    "rate for a while."
)
_LINES = (
    "fault",
    "spike",
    "divergence",
    "nonfinite",
    "decision",
    "rollback",
    "routing",
    "recovered",
)


def demo(
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Serve the page at the end, or just end.")
    ] = True,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")
    ] = 0,
    run: Annotated[
        Path | None, typer.Option(help="Run directory.  (default: runs/demo-TIME)")
    ] = None,
) -> None:
    """Train a small model on real text, tear it on purpose, and see it found, answered and
    recovered.
    """
    from geodiag.cli.output import prose, screen
    from geodiag.cli.progress import watch
    from geodiag.cli.train_options import Options, new_run_folder
    from geodiag.cli.training import Training
    from geodiag.run import open_run

    path = run or new_run_folder("demo")
    screen().print(prose(_INTRODUCTION))
    screen().print()
    options = Options(
        steps=STEPS,
        routing="auto",
        rollback="memory",
        snapshot_every=25,
        period=40,
        inject=(FAULT,),
        run=path,
    )
    watch(Training(options))
    _tell(open_run(path))
    if serve:
        from geodiag.cli.dashboard import dashboard

        dashboard(path, port=port)
    else:
        screen().print(f"\nSee it: geodiag dashboard {path}")


def _tell(run: "Run") -> None:
    """What happened, from the run's own record."""
    from rich.table import Table

    from geodiag.cli.output import screen

    events = run.read("events")
    table = Table(
        title="\nWhat the run directory says", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for name in ("step", "what", "why"):
        table.add_column(name, justify="right" if name == "step" else "left", overflow="fold")
    for event in (
        events[events["kind"].isin(_LINES)]
        .sort_values(["attempt", "step"], kind="stable")
        .to_dict("records")
    ):
        table.add_row(str(event["step"]), str(event["kind"]), str(event["message"]))
    screen().print(table)
    loss = run.read("steps", ["step", "loss"]).set_index("step")["loss"]
    before, after = loss.loc[FAULT_STEP - 30 : FAULT_STEP - 1].mean(), loss.iloc[-20:].mean()
    peak = run.read("steps", ["step", "loss"], steps=(FAULT_STEP, None), attempt="all")[
        "loss"
    ].max()
    screen().print(
        f"\nloss before the fault {before:.2f}, at its peak {peak:.2f}, at the end {after:.2f} nats/token"
    )
