"""attach: find a model's sites, routers and experts, say what was found, and begin its run."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from geodiag import log
from geodiag.errors import GeodiagError
from geodiag.hooks.adapters import Layout, find_layout
from geodiag.hooks.build_monitor import build_monitor
from geodiag.hooks.control.policy import Policy, Rollback, Route, as_policy
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.measure.parameter_norms import optimizers_in
from geodiag.hooks.monitor import Monitor
from geodiag.hooks.probes.token_trace import Trace
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.snapshots.disk_store import snapshots_in
from geodiag.hooks.snapshots.snapshots import Snapshots
from geodiag.hooks.step_measurement import MeasurementPlan
from geodiag.metrics.cadence import PROBE_EVERY, Cadence, Every, parse_layers
from geodiag.run import Run

_COUNTERFACTUAL = ("clamp_gate_rate", "clamp_up_high_rate", "clamp_up_low_rate")
"""What an unclamped model would have had clamped."""


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    path: str | os.PathLike,
    *,
    routing: Rerouting | None = None,
    policy: str | Policy = "off",
    snapshots: Snapshots | None = None,
    resume: bool = False,
    probe: tuple | Mapping[str, Any] | None = None,
    probe_every: int = PROBE_EVERY,
    probe_domains: Sequence[str] | None = None,
    trace: Trace = "flipped",
    every: Every = 1,
    layers: str | Iterable[int] | None = None,
    sample: int = 1024,
    micro_batches: int = 1,
    first_step: int = 0,
    config: Mapping[str, Any] | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Monitor:
    """Watches `model` and records every step of its training in the run directory `path`.

    Finds the model's residual sites, routers and experts by itself and says what it found. Call
    `step(loss)` on what is returned after every optimizer step. In a training of several ranks
    every rank does both, after torch.distributed.init_process_group and before or after DDP or
    `fully_shard`.

    routing: an AnticipatoryRouting or RouterLag that may be switched. snapshots: what a rollback
    can go back to.
    policy: a `Policy`, or the mode of one: `off` (only record what would be done), `auto` or `on`.
    resume: go on from the newest snapshot that an earlier training left on disk in `path`, if it
    left one.
    probe: arguments of a fixed batch for the probes; without it, the first batch. probe_every:
    steps between probes; slow ones (curvature, perturbation growth) keep their ratio.
    probe_domains: the domain of each of its sequences.
    trace: which tokens of it are followed: `flipped`, `margin`, or their places.
    every: steps between samples, for all metrics or by the beginning of their names: {"": 10,
    "amax_gain": 1}.
    layers: those that are recorded, e.g. "0-7,30-". sample: tokens a micro-batch for per-token
    products.
    micro_batches: of a step. More are found by themselves, except inside a compiled model.
    fresh: parts of the model are compiled already, but have not run yet, so that they can still be
    watched.

    GeodiagError where the model has no blocks to watch, or `path` cannot be written.
    """
    if min(sample, micro_batches) < 1:
        raise ValueError("sample and micro_batches are at least 1")
    optimizers = optimizers_in(optimizer)
    layout = find_layout(model, fresh)
    plan = MeasurementPlan(
        cadence=Cadence.of(every, probe_every, parse_layers(layers, len(layout.layers))),
        sample=sample,
        micro_batches=micro_batches,
        probe=probe,
        probe_domains=None if probe_domains is None else tuple(probe_domains),
        trace=trace,
    )
    layout = replace(layout, watched=plan.cadence.layers)
    policy = as_policy(policy)
    ranks = Ranks.join()
    ranks.check_same("cadence", plan.cadence.record())
    ranks.check_same("model", {k: v for k, v in layout.summary().items() if k != "missing"})
    if ranks.unreachable_ranks and (policy.mode != "off" or resume):
        raise GeodiagError(
            f"{'resume' if resume else f'routing {policy.mode}'} on {ranks.world} ranks needs them to agree; "
            "call torch.distributed.init_process_group before attach"
        )
    ranks.run_on_all(lambda: _check_means(policy, routing, snapshots))
    ranks.run_on_all(lambda: _check_folder(Path(path), ranks.rank, snapshots, resume))
    unclamped = any(e.gate_limit is None for e in layout.experts)

    def create(attempt: int | None) -> Run:
        return Run.create(
            path,
            found=layout.summary(),
            config={
                "routing": _planned(policy, routing),
                "cadence": plan.cadence.record(),
                **(config or {}),
            },
            counterfactual=_COUNTERFACTUAL if unclamped else (),
            rank=ranks.rank,
            world_size=ranks.world,
            attempt=attempt,
        )

    run = ranks.create_on_all(
        create, attempt_of=lambda made: made.attempt, undo=lambda made: made.close("failed")
    )
    if not quiet and ranks.rank == 0:
        log.info(_introduction(layout, path))
    monitor = None
    try:
        if snapshots is not None:
            snapshots.keep_in(Path(path), ranks.rank)
        monitor = build_monitor(
            model,
            optimizers,
            run,
            layout,
            plan,
            ranks,
            routing=routing,
            policy=policy,
            snapshots=snapshots,
            first_step=first_step,
        )
        monitor.begin(resume)
    except (
        BaseException
    ) as e:  # also Ctrl-C: a run whose watch never began must not say that it runs
        if snapshots is not None:
            snapshots.close()
        (monitor or run).close("interrupted" if isinstance(e, KeyboardInterrupt) else "failed")
        raise
    return monitor


def _check_means(policy: Policy, routing: Rerouting | None, snapshots: Snapshots | None) -> None:
    """GeodiagError where the policy is to act and has not got what it acts with."""
    if policy.mode == "off":
        return
    if routing is None and (policy.does(Route) or policy.mode == "on"):
        raise GeodiagError(
            f"routing {policy.mode} needs an AnticipatoryRouting; pass attach(..., routing=...)"
        )
    if snapshots is None and policy.does(Rollback):
        raise GeodiagError(
            "the action rollback needs something to go back to; pass attach(..., snapshots=...)"
        )


def _check_folder(path: Path, rank: int, snapshots: Snapshots | None, resume: bool) -> None:
    """GeodiagError where snapshots of an earlier training and what is asked for do not go together."""
    there = snapshots_in(path, rank)
    if resume and (snapshots is None or snapshots.where != "disk"):
        raise GeodiagError(
            "only snapshots on disk can be resumed from; pass snapshots=Snapshots(..., where='disk')"
        )
    if there and not resume and snapshots is not None and snapshots.where == "disk":
        fix = f"pass resume=True to go on from step {there[-1]}, or another path"
        raise GeodiagError(f"{path} holds snapshots of an earlier training; {fix}")


def _planned(policy: Policy, routing: Rerouting | None) -> dict[str, Any]:
    """What the manifest says of steering."""
    settings = policy.as_dict()
    return {
        "policy": settings.pop("mode"),
        **settings,
        "variant": routing.variant if routing else None,
        "delay_steps": routing.delay_steps if routing else None,
    }


def _introduction(layout: Layout, path: str | os.PathLike) -> str:
    learned = sum(not r.hashed for r in layout.routers)
    hashed = len(layout.routers) - learned
    parts = [
        f"{len(layout.sites)} residual sites of {layout.streams} stream{'s' * (layout.streams > 1)}"
    ]
    if layout.routers:
        parts.append(f"{learned} learned routers" + (f" and {hashed} by hash" if hashed else ""))
        parts.append(f"{layout.routers[0].experts} experts a layer")
    lines = [f"geodiag watches a {layout.family} model: {', '.join(parts)}; recording to {path}"]
    return "\n".join(lines + [f"  {m}" for m in layout.missing])
