"""What a training is asked to be: the options of `geodiag train`, and how a resumed one gets those
it began with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    from geodiag.hooks.control.policy import Policy

CHANGEABLE = {
    "steps", "device", "routing", "routing_mode", "delay", "period", "cooldown", "budget", "on", "actions", "rollback",
    "snapshot_every", "snapshot_bytes", "every", "probe_every", "layers", "trace",
}  # fmt: skip
"""What a resumed training may have otherwise than the one that it goes on with."""


GOING_BACK = "rollback,route,lower-lr=0.5"
"""What auto does by itself with snapshots to go back to. Going back needs a change with it, and of
those that were measured half the learning rate is the one that helped at both sizes of model,
beside routing too (docs/routing.md).
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a training is asked to be; recorded in the run's manifest."""

    residual: str = "mhc"
    size: str = "tiny"
    data: str = "stdlib"
    steps: int = 300
    seed: int = 0
    device: str = "auto"
    kernels: str = "auto"
    routing: str = "off"
    routing_mode: str = "anticipatory"
    delay: int = 8
    on: str = "spike"
    actions: str | None = None
    """None for all that there are means for: rollback where snapshots are taken, and routing."""
    period: int = 50
    cooldown: int = 100
    budget: int = 8
    rollback: str = "none"
    snapshot_every: int = 25
    snapshot_bytes: float | None = None
    inject: tuple[str, ...] = ()
    run: Path = field(default_factory=lambda: Path("runs/run"))
    resume: bool = False
    lr: float | None = None
    sequences: int = 8
    micro_batches: int = 1
    clamp: float | None = 10.0
    recompute: str | None = None
    """None for what the size does by itself."""
    deterministic: bool = False
    probe_every: int = 10
    every: tuple[str, ...] = ()
    """Steps between samples, and METRIC=STEPS."""
    layers: str | None = None
    trace: str = "flipped"
    parallel: str = "ddp"

    def policy(self) -> "Policy":
        """The policy that these options ask for. GeodiagError where they make no sense."""
        from geodiag.hooks.control.policy import Policy

        actions = self.actions
        if actions is None:
            actions = "route" if self.rollback == "none" else GOING_BACK
        try:
            policy = Policy(
                mode=self.routing,  # type: ignore[arg-type]
                on=self.on,
                actions=actions,
                period=self.period,
                cooldown=self.cooldown,
                budget=self.budget,
            )
        except ValueError as e:
            raise GeodiagError(str(e)) from None
        if policy.does("rollback") and self.rollback == "none":
            raise GeodiagError(
                "the action rollback needs snapshots; pass --rollback memory, or disk"
            )
        return policy

    def recorded(self) -> dict[str, Any]:
        """As the manifest has them."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        return said | {"run": str(self.run)}


def resumed(path: Path, given: Mapping[str, Any]) -> Options:
    """The options that a run began with, changed by what is `given` now. GeodiagError where that
    cannot be.
    """
    from geodiag.hooks.snapshots.disk_store import snapshots_in
    from geodiag.run import open_run

    run = open_run(path)
    config = run.manifest.get("config")
    said = config.get("options") if isinstance(config, dict) else None
    if not isinstance(said, dict):
        raise GeodiagError(f"{path} is no run of geodiag train; resume one that is")
    if run.status() == "running":
        raise GeodiagError(f"{path} is still running; stop it first")
    if not snapshots_in(path):
        raise GeodiagError(
            f"{path} holds no snapshots; only a training with --rollback disk can be resumed"
        )
    fixed = sorted(n for n, v in given.items() if n not in CHANGEABLE and _listed(v) != said.get(n))
    if fixed:
        raise GeodiagError(
            f"a resumed training keeps its --{fixed[0].replace('_', '-')}; leave that out"
        )
    known = {f.name for f in fields(Options)}
    began = Options(**{k: v for k, v in said.items() if k in known})
    every = (
        tuple(began.every) if isinstance(began.every, list) else (str(began.every),)
    )  # a number, once
    began = replace(
        began, inject=tuple(began.inject), every=every, run=path, resume=True, rollback="disk"
    )
    return replace(began, **{k: v for k, v in given.items() if k != "rollback"})


def _listed(value: Any) -> Any:
    """As JSON gives it back."""
    return (
        list(value)
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
    )
