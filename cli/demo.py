"""`geodiag demo`: a training with a planted fault, found and repaired, in two minutes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from geodiag.run import Run

FAULT_STEP = 150
FAULT = f"lr-shock@{FAULT_STEP}=30"
STEPS = 240

_INTRODUCTION = (
    f"geodiag demo: {STEPS} steps of a small mixture-of-experts model with hyper-connections, "
    "trained on the source code of the Python standard library. "
    f"At step {FAULT_STEP} the learning rate becomes 30 times too large for ten steps. "
    "The detector and the controller get no hint of it. When the detector reports the spike, "
    "the controller rolls training back to a snapshot from before the fault. Training then repeats "
    "the same batches, with experts chosen by older weights and at half the learning rate."
)
_KINDS_IN_TABLE = (
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
        bool, typer.Option("--serve/--no-serve", help="Serve the dashboard at the end, or exit.")
    ] = True,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the dashboard; 0 takes a free one.")
    ] = 0,
    run: Annotated[
        Path | None, typer.Option(help="Run directory.", show_default="runs/demo-TIME")
    ] = None,
) -> None:
    """Train a small model, plant a fault, and show how geodiag finds and repairs it."""
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
    _print_events(open_run(path))
    if serve:
        from geodiag.cli.dashboard import dashboard

        dashboard(path, port=port)
    else:
        screen().print(f"\nSee it: geodiag dashboard {path}")


def _print_events(run: "Run") -> None:
    """Print the recorded events and the loss before, during and after the fault."""
    from rich.table import Table

    from geodiag.cli.output import screen

    events = run.read("events")
    events = events[events["kind"].isin(_KINDS_IN_TABLE)]
    events = events.sort_values(["attempt", "step"], kind="stable")
    table = Table(title="\nRecorded events", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("step", "what", "why"):
        table.add_column(name, justify="right" if name == "step" else "left", overflow="fold")
    for event in events.to_dict("records"):
        table.add_row(str(event["step"]), str(event["kind"]), str(event["message"]))
    screen().print(table)

    columns = ["step", "loss"]
    loss = run.read("steps", columns).set_index("step")["loss"]
    before = loss.loc[FAULT_STEP - 30 : FAULT_STEP - 1].mean()
    end = loss.iloc[-20:].mean()
    peak = run.read("steps", columns, steps=(FAULT_STEP, None), attempt="all")["loss"].max()
    screen().print(
        f"\nloss in nats/token: {before:.2f} before the fault, {peak:.2f} at its peak, "
        f"{end:.2f} at the end"
    )
