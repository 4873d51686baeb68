"""`geodiag train`: trains a reference model, instrumented."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from geodiag.cli.loop import Training

Recompute = Literal["none", "mhc", "layers"]
Parallel = Literal["ddp", "fsdp"]
Size = Literal["tiny", "small", "3b", "9b", "27b"]

_INJECT = "Plant a fault, KIND@STEP[:LAYER][=MAGNITUDE]; may be given several times. Kinds: docs/faults.md."
_DATA = "stdlib (the interpreter's own library), a folder, a text file, or a .bin of uint16/uint32 tokens."
_ROUTING = "Anticipatory routing: off only records what it would do, auto answers spikes, on stays on."

_RUN = "Run directory; torchrun takes --run for its own, so write --run-dir.  [default: runs/SIZE-RESIDUAL-TIME]"
_PARALLEL = "Under torchrun: ddp (whole weights on each rank) or fsdp (weights spread over the ranks)."


def train(
    residual: Annotated[Literal["plain", "hc", "mhc"], typer.Option(help="Residual connections.")] = "mhc",
    size: Annotated[Size, typer.Option(help="Model size.")] = "tiny",
    data: Annotated[str, typer.Option(help=_DATA)] = "stdlib",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU where there is one.")] = "auto",
    kernels: Annotated[Literal["auto", "reference", "triton"], typer.Option(help="Which kernels run.")] = "auto",
    routing: Annotated[Literal["off", "auto", "on"], typer.Option(help=_ROUTING)] = "off",
    delay: Annotated[int, typer.Option(min=0, max=64, help="Δ of anticipatory routing, in steps.")] = 8,
    period: Annotated[int, typer.Option(min=1, help="Steps that routing stays on after a spike.")] = 50,
    cooldown: Annotated[int, typer.Option(min=0, help="Steps after that in which no new period begins.")] = 100,
    inject: Annotated[list[str] | None, typer.Option(help=_INJECT, show_default=False)] = None,
    run: Annotated[Path | None, typer.Option("--run", "--run-dir", help=_RUN)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.  [default: 0.003]", show_default=False)] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 8,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches that a step is split into.")] = 1,
    clamp: Annotated[float, typer.Option(min=0, help="SwiGLU clamp; 0 for none.")] = 10.0,
    recompute: Annotated[
        Recompute | None, typer.Option(help="What the backward computes once more.  [default: the size's own]")
    ] = None,
    parallel: Annotated[Parallel, typer.Option(help=_PARALLEL)] = "ddp",
    every: Annotated[int, typer.Option(min=1, help="Steps between samples of the layers.")] = 1,
    probe_every: Annotated[int, typer.Option(min=1, help="Steps between probes of flips and weight spectra.")] = 10,
) -> None:
    """Train a reference model, instrumented: every step is recorded in the run directory."""
    from geodiag.cli.loop import Options, Training
    from geodiag.cli.progress import watch

    options = Options(
        residual=residual,
        size=size,
        data=data,
        steps=steps,
        seed=seed,
        device=device,
        kernels=kernels,
        routing=routing,
        delay=delay,
        period=period,
        cooldown=cooldown,
        inject=tuple(inject or ()),
        run=run or Path("runs") / f"{size}-{residual}-{datetime.now():%Y%m%d-%H%M%S}",
        lr=lr,
        sequences=sequences,
        micro_batches=micro_batches,
        clamp=clamp or None,
        recompute=recompute,
        parallel=parallel,
        every=every,
        probe_every=probe_every,
    )
    training = Training(options)
    watch(training)
    if training.place.rank == 0:
        _verdict(training)


def _verdict(training: "Training") -> None:
    from geodiag.cli.show import show

    show(str(training.options.run))
    typer.echo(f"\nSee it: geodiag dashboard {training.options.run}")
