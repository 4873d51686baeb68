"""`geodiag train`: trains a reference model, instrumented."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from geodiag.cli.training import Training

Recompute = Literal["none", "mhc", "layers"]
Parallel = Literal["ddp", "fsdp"]
Size = Literal["tiny", "small", "3b", "9b", "27b"]

_MODEL, _TRAINING, _RECORD, _LOOP = "Model", "Training", "What is recorded", "Closed loop"

_INJECT = "Plant a fault, KIND@STEP[-LAST][:LAYER][=MAGNITUDE]; may be given several times. Kinds: docs/faults.md."
_DATA = "stdlib (the interpreter's own library), a folder, a text file, or a .bin of uint16/uint32 tokens."
_ROUTING = "off only records what would be done, auto intervenes, on keeps anticipatory routing on."
_MODE = "anticipatory: all weights of Δ steps ago choose the experts; router-lag: only the router's, which is cheap."
_ON = "What auto answers, with commas: spike, warning, schedule:START-END."
_ACTIONS = (
    "What auto does, with commas: rollback, skip-batch, route, lower-lr=FACTOR, clamp=LIMIT.  "
    "(default: route; with --rollback rollback,route,lower-lr=0.5)"
)
_ROLLBACK = (
    "Where snapshots are kept to go back to; from disk, a killed training can also be resumed."
)
_BYTES = "Budget of all snapshots in bytes, e.g. 64e9.  (default: half of what is free)"
_EVERY = "Steps between samples, of everything or of metrics by the beginning of their names; repeatable.  (default: 1)"
_LAYERS = "Layers that are recorded, e.g. 0-7,30-.  (default: all)"
_TRACE = (
    "Tokens of the probe batch that are followed: flipped, margin, or their places with commas."
)
_DETERMINISTIC = "The same bits every time on a GPU too, whose attention is otherwise free to add up in any order."
_RESUME = "Go on with a training that ended or was killed, from its newest snapshot on disk."

_RUN = "Run directory; torchrun takes --run for its own, so write --run-dir.  (default: runs/SIZE-RESIDUAL-TIME)"
_PARALLEL = (
    "Under torchrun: ddp (whole weights on each rank) or fsdp (weights spread over the ranks)."
)


def train(
    ctx: typer.Context,
    residual: Annotated[
        Literal["plain", "hc", "mhc"],
        typer.Option(help="Residual connections.", rich_help_panel=_MODEL),
    ] = "mhc",
    size: Annotated[Size, typer.Option(help="Model size.", rich_help_panel=_MODEL)] = "tiny",
    data: Annotated[str, typer.Option(help=_DATA, rich_help_panel=_TRAINING)] = "stdlib",
    steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=_TRAINING)
    ] = 300,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**63 - 1, help="Seed of weights and data.", rich_help_panel=_TRAINING
        ),
    ] = 0,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one.",
            rich_help_panel=_TRAINING,
        ),
    ] = "auto",
    kernels: Annotated[
        Literal["auto", "reference", "triton"],
        typer.Option(help="Which kernels run.", rich_help_panel=_MODEL),
    ] = "auto",
    routing: Annotated[
        Literal["off", "auto", "on"], typer.Option(help=_ROUTING, rich_help_panel=_LOOP)
    ] = "off",
    delay: Annotated[
        int,
        typer.Option(
            min=0, max=64, help="Δ of anticipatory routing, in steps.", rich_help_panel=_LOOP
        ),
    ] = 8,
    routing_mode: Annotated[
        Literal["anticipatory", "router-lag"], typer.Option(help=_MODE, rich_help_panel=_LOOP)
    ] = "anticipatory",
    on: Annotated[str, typer.Option(help=_ON, rich_help_panel=_LOOP)] = "spike",
    actions: Annotated[
        str | None, typer.Option(help=_ACTIONS, show_default=False, rich_help_panel=_LOOP)
    ] = None,
    period: Annotated[
        int,
        typer.Option(
            min=1,
            help="Steps that an intervention lasts, after the warm-up.",
            rich_help_panel=_LOOP,
        ),
    ] = 50,
    cooldown: Annotated[
        int,
        typer.Option(
            min=0, help="Steps after that in which no new one begins.", rich_help_panel=_LOOP
        ),
    ] = 100,
    budget: Annotated[
        int, typer.Option(min=0, help="Interventions allowed in a run.", rich_help_panel=_LOOP)
    ] = 8,
    rollback: Annotated[
        Literal["none", "memory", "disk"], typer.Option(help=_ROLLBACK, rich_help_panel=_LOOP)
    ] = "none",
    snapshot_every: Annotated[
        int, typer.Option(min=1, help="Steps between snapshots.", rich_help_panel=_LOOP)
    ] = 25,
    snapshot_bytes: Annotated[
        float | None, typer.Option(min=1, help=_BYTES, show_default=False, rich_help_panel=_LOOP)
    ] = None,
    inject: Annotated[
        list[str] | None, typer.Option(help=_INJECT, show_default=False, rich_help_panel=_TRAINING)
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "--run-dir", help=_RUN, rich_help_panel=_RECORD)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate.  (default: 0.003)",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=1, help="Sequences a step.", rich_help_panel=_TRAINING)
    ] = 8,
    micro_batches: Annotated[
        int,
        typer.Option(
            min=1, help="Micro-batches that a step is split into.", rich_help_panel=_TRAINING
        ),
    ] = 1,
    clamp: Annotated[
        float, typer.Option(min=0, help="SwiGLU clamp; 0 for none.", rich_help_panel=_MODEL)
    ] = 10.0,
    recompute: Annotated[
        Recompute | None,
        typer.Option(
            help="What the backward computes once more.  (default: the size's own)",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help=_DETERMINISTIC, rich_help_panel=_MODEL)
    ] = False,
    parallel: Annotated[Parallel, typer.Option(help=_PARALLEL, rich_help_panel=_TRAINING)] = "ddp",
    every: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|METRIC=N", help=_EVERY, show_default=False, rich_help_panel=_RECORD
        ),
    ] = None,
    probe_every: Annotated[
        int,
        typer.Option(
            min=1, help="Steps between probes; slow ones keep their ratio.", rich_help_panel=_RECORD
        ),
    ] = 10,
    layers: Annotated[
        str | None, typer.Option(help=_LAYERS, show_default=False, rich_help_panel=_RECORD)
    ] = None,
    trace: Annotated[str, typer.Option(help=_TRACE, rich_help_panel=_RECORD)] = "flipped",
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help=_RESUME, show_default=False, rich_help_panel=_RECORD),
    ] = None,
) -> None:
    """Train a reference model, instrumented: every step is recorded in the run directory."""
    from geodiag.cli.progress import watch
    from geodiag.cli.train_options import Options, resumed
    from geodiag.cli.training import Training

    asked = {k: v for k, v in ctx.params.items() if k != "resume"}
    asked |= {"inject": tuple(inject or ()), "every": tuple(every or ()), "clamp": clamp or None}
    if resume is None:
        asked["run"] = run or Path("runs") / f"{size}-{residual}-{datetime.now():%Y%m%d-%H%M%S}"
        options = Options(**asked)
    else:
        given = {k: v for k, v in asked.items() if _said(ctx, k)}
        options = resumed(resume, given)
    training = Training(options)
    watch(training)
    if training.place.rank == 0:
        _verdict(training)


def _said(ctx: typer.Context, name: str) -> bool:
    """Whether somebody wrote the option, even if with its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _verdict(training: "Training") -> None:
    from geodiag.cli.show import show

    show(str(training.options.run))
    typer.echo(f"\nSee it: geodiag dashboard {training.options.run}")
