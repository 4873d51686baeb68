"""Options of `geodiag train`: one class per panel of the help, one declaration per option.

Defaults that the Python interface has too are taken from there.
"""

from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from geodiag.defaults import DELAY_STEPS, MAX_DELAY_STEPS, PROBE_EVERY, SNAPSHOT_EVERY
from geodiag.errors import GeodiagError
from geodiag.hooks.control.policy import Mode, Policy, Rollback
from geodiag.hooks.control.policy_parts import as_text
from geodiag.reference_models.config import Kernels, ModelConfig, Recompute, Residual

if TYPE_CHECKING:
    from geodiag.hooks.snapshots.snapshots import Snapshots

Size = Literal["tiny", "small", "3b", "9b", "27b"]
Parallel = Literal["ddp", "fsdp"]

ACTIONS_WITH_ROLLBACK = "rollback,route,lower-lr=0.5"
"""What `auto` does by default where snapshots are kept. A rollback alone repeats the same steps, so
something has to change: of the changes measured, half the learning rate helped at both model sizes,
with and without routing (docs/routing.md).
"""


def _none_if_zero(value: float) -> float | None:
    return value or None


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is trained."""

    panel = "Model"

    residual: Annotated[
        Residual,
        typer.Option(help="Residual connection: plain, hyper-connections (hc) or mHC (mhc)."),
    ] = ModelConfig.residual
    size: Annotated[Size, typer.Option(help="Size of the model.")] = "tiny"
    kernels: Annotated[
        Kernels,
        typer.Option(help="Implementation of the kernels; auto takes Triton on a GPU."),
    ] = ModelConfig.kernels
    clamp: Annotated[
        float | None,
        typer.Option(
            min=0, help="Limit of the SwiGLU clamp; 0 turns it off.", callback=_none_if_zero
        ),
    ] = ModelConfig.swiglu_limit
    recompute: Annotated[
        Recompute | None,
        typer.Option(help="What the backward pass recomputes.", show_default="set by --size"),
    ] = None
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Make attention on a GPU repeatable to the bit; it is slower.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How it is trained."""

    panel = "Training"

    data: Annotated[
        str,
        typer.Option(
            help="stdlib (source code of the Python standard library), a folder, a text file, "
            "or a .bin file of uint16 or uint32 tokens."
        ),
    ] = "stdlib"
    steps: Annotated[int, typer.Option(min=1, help="Number of optimizer steps.")] = 300
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of the weights and the data.")
    ] = 0
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU if there is one.")
    ] = "auto"
    inject: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="FAULT",
            help="Plant a fault: KIND@STEP, then -LAST, :LAYER and =MAGNITUDE as needed; "
            "repeatable. docs/faults.md lists the kinds.",
            show_default=False,
        ),
    ] = ()
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="0.003")] = (
        None
    )
    sequences: Annotated[
        int, typer.Option(min=1, help="Sequences of a step, on all ranks together.")
    ] = 8
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 1
    parallel: Annotated[
        Parallel,
        typer.Option(
            help="Under torchrun: ddp (full weights on each rank) or "
            "fsdp (weights sharded over the ranks)."
        ),
    ] = "ddp"


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How the controller responds to spikes."""

    panel = "Closed loop"

    routing: Annotated[
        Mode,
        typer.Option(
            help="off only records what auto would do, auto intervenes, "
            "on keeps anticipatory routing on."
        ),
    ] = Policy.mode
    delay: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_DELAY_STEPS,
            help="Δ: how many steps old the weights are that choose the experts.",
        ),
    ] = DELAY_STEPS
    routing_mode: Annotated[
        Literal["anticipatory", "router-lag"],
        typer.Option(
            help="anticipatory: the whole model of Δ steps ago chooses the experts; "
            "router-lag (cheap): only the router's weights are Δ steps old."
        ),
    ] = "anticipatory"
    on: Annotated[
        str,
        typer.Option(
            help="What auto responds to, separated by commas: spike, warning, schedule:START-END."
        ),
    ] = as_text(Policy.on)
    actions: Annotated[
        str | None,
        typer.Option(
            help="What auto does, separated by commas: "
            "rollback, skip-batch, route, lower-lr=FACTOR, clamp=LIMIT.",
            show_default=f"{as_text(Policy.actions)}; {ACTIONS_WITH_ROLLBACK} with --rollback",
        ),
    ] = None
    period: Annotated[
        int, typer.Option(min=1, help="Steps that an intervention lasts, without its warm-up.")
    ] = Policy.period
    cooldown: Annotated[
        int, typer.Option(min=0, help="Steps after an intervention in which no other begins.")
    ] = Policy.cooldown
    budget: Annotated[
        int, typer.Option(min=0, help="Largest number of interventions in a run.")
    ] = Policy.budget
    rollback: Annotated[
        Literal["none", "memory", "disk"],
        typer.Option(
            help="Where snapshots are kept; with disk, a killed training can be resumed as well."
        ),
    ] = "none"
    snapshot_every: Annotated[int, typer.Option(min=1, help="Steps between snapshots.")] = (
        SNAPSHOT_EVERY
    )
    snapshot_bytes: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Limit in bytes for all snapshots together, e.g. 64e9.",
            show_default="half of the free memory or disk",
        ),
    ] = None

    def policy(self) -> Policy:
        """Return the policy of these options. GeodiagError where they contradict each other."""
        actions = self.actions
        if actions is None:
            actions = as_text(Policy.actions) if self.rollback == "none" else ACTIONS_WITH_ROLLBACK
        try:
            policy = Policy.parse(
                actions,
                on=self.on,
                mode=self.routing,
                period=self.period,
                cooldown=self.cooldown,
                budget=self.budget,
            )
        except ValueError as e:
            raise GeodiagError(str(e)) from None
        if policy.does(Rollback) and self.rollback == "none":
            raise GeodiagError(
                "the action rollback needs snapshots; pass --rollback memory or disk"
            )
        return policy

    def snapshots(self, *parts: Any) -> "Snapshots | None":
        """Return snapshots of `parts`, the model and its optimizers; None without --rollback."""
        from geodiag.hooks.snapshots.snapshots import Snapshots

        if self.rollback == "none":
            return None
        limit = None if self.snapshot_bytes is None else int(self.snapshot_bytes)
        try:
            return Snapshots(
                *parts, every=self.snapshot_every, where=self.rollback, max_bytes=limit
            )
        except ValueError as e:
            raise GeodiagError(str(e)) from None


@dataclass(frozen=True, kw_only=True)
class RecordingOptions:
    """What is recorded; `geodiag run` has these options too."""

    panel = "Recording"

    every: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="N|METRIC=N",
            help="Steps between samples, of all metrics or of those whose names begin with METRIC; "
            "repeatable.",
            show_default="1",
        ),
    ] = ()
    probe_every: Annotated[
        int,
        typer.Option(min=1, help="Steps between probes; slow probes keep their multiple of it."),
    ] = PROBE_EVERY
    layers: Annotated[
        str | None, typer.Option(help="Layers to record, e.g. 0-7,30-.", show_default="all")
    ] = None
    trace: Annotated[
        str,
        typer.Option(
            help="Tokens of the probe batch to trace: flipped, margin, "
            "or their positions, separated by commas."
        ),
    ] = "flipped"


@dataclass(frozen=True, kw_only=True)
class Options(RecordingOptions, LoopOptions, TrainingOptions, ModelOptions):
    """All options of a training; recorded in the run's manifest."""

    panel = RecordingOptions.panel

    run: Annotated[
        Path,
        typer.Option(
            "--run",
            "--run-dir",
            help="Run directory. Under torchrun write --run-dir: torchrun has a --run of its own.",
            show_default="runs/SIZE-RESIDUAL-TIME",
        ),
    ] = Path("runs/run")
    resume: bool = False
    """Continue the training that is recorded in `run`."""

    def manifest(self) -> dict[str, Any]:
        """Return the options as run.json holds them."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"run": str(self.run)}


CHANGEABLE = {
    "steps",
    "device",
    *(f.name for group in (LoopOptions, RecordingOptions) for f in fields(group)),
}
"""Options that a resumed training may have otherwise than the training that it continues."""


def new_run_folder(name: str) -> Path:
    """Return a run directory named by `name` and the time."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
