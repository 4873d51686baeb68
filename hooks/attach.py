"""attach: find a model's residual sites, routers and experts, and start recording its training."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from geodiag import log
from geodiag.defaults import PROBE_EVERY
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
from geodiag.metrics.cadence import Cadence, Every, parse_layers
from geodiag.run import Run

_COUNTERFACTUAL = ("clamp_gate_rate", "clamp_up_high_rate", "clamp_up_low_rate")
"""Metrics of what a clamp would have changed in a model that has none."""


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
    """Record every step of the training of `model` in the run directory `path`.

    Finds the model's residual sites, routers and experts and prints what it found. Call
    `step(loss)` of the returned monitor after every optimizer step. In a training of several ranks
    every rank does both, after torch.distributed.init_process_group and before or after DDP or
    `fully_shard`.

    routing: an AnticipatoryRouting or RouterLag that the controller may switch.
    policy: a `Policy`, or the mode of one: `off` (only record what would be done), `auto` or `on`.
    snapshots: what a rollback returns to.
    resume: continue from the newest snapshot on disk in `path`, if there is one.
    probe: arguments of a fixed batch for the probes; default: the first batch.
    probe_every: steps between probes. Slow probes (curvature, perturbation growth) run less often,
        in a fixed ratio to it.
    probe_domains: the domain of each sequence of the probe.
    trace: the tokens of the probe that are followed: `flipped`, `margin`, or their positions.
    every: steps between samples, for all metrics or by the beginning of their names:
        {"": 10, "amax_gain": 1}.
    layers: the layers that are recorded, e.g. "0-7,30-"; default: all.
    sample: tokens a micro-batch for products per token.
    micro_batches: micro-batches a step. More are found without it, except in a compiled model.
    first_step: the number of the first step.
    config: anything that the manifest of the run is to hold.
    fresh: parts of the model are compiled already but have not run yet, so that hooks still work.
    quiet: do not print what was found.

    Raises GeodiagError if the model has no list of blocks, or `path` cannot be written.
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
        what = "resume" if resume else f"routing {policy.mode}"
        raise GeodiagError(
            f"{what} on {ranks.world} ranks needs them to agree; "
            "call torch.distributed.init_process_group before attach"
        )
    ranks.run_on_all(lambda: _check_means(policy, routing, snapshots))
    ranks.run_on_all(lambda: _check_folder(Path(path), ranks.rank, snapshots, resume))

    settings = {"routing": _planned(policy, routing), "cadence": plan.cadence.record()}
    run = _create_run(path, layout, ranks, {**settings, **(config or {})})
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
    except BaseException as error:  # also Ctrl-C: the manifest must not read "running" for ever
        if snapshots is not None:
            snapshots.close()
        interrupted = isinstance(error, KeyboardInterrupt)
        (monitor or run).close("interrupted" if interrupted else "failed")
        raise
    return monitor


def _create_run(
    path: str | os.PathLike, layout: Layout, ranks: Ranks, config: dict[str, Any]
) -> Run:
    """Create the run directory: rank 0 first, then the others with rank 0's attempt. Collective."""
    unclamped = any(e.gate_limit is None for e in layout.experts)

    def create(attempt: int | None) -> Run:
        return Run.create(
            path,
            found=layout.summary(),
            config=config,
            counterfactual=_COUNTERFACTUAL if unclamped else (),
            rank=ranks.rank,
            world_size=ranks.world,
            attempt=attempt,
        )

    return ranks.create_on_all(
        create, attempt_of=lambda run: run.attempt, undo=lambda run: run.close("failed")
    )


def _check_means(policy: Policy, routing: Rerouting | None, snapshots: Snapshots | None) -> None:
    """GeodiagError if the policy may act but lacks the routing or the snapshots to act with."""
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
    """GeodiagError if `resume` does not fit the snapshots that an earlier training left."""
    found = snapshots_in(path, rank)
    if resume and (snapshots is None or snapshots.where != "disk"):
        raise GeodiagError(
            "only snapshots on disk can be resumed from; "
            "pass snapshots=Snapshots(..., where='disk')"
        )
    if found and not resume and snapshots is not None and snapshots.where == "disk":
        fix = f"pass resume=True to go on from step {found[-1]}, or another path"
        raise GeodiagError(f"{path} holds snapshots of an earlier training; {fix}")


def _planned(policy: Policy, routing: Rerouting | None) -> dict[str, Any]:
    """Return the policy and the routing as the manifest records them."""
    settings = policy.as_dict()
    return {
        "policy": settings.pop("mode"),
        **settings,
        "variant": routing.variant if routing else None,
        "delay_steps": routing.delay_steps if routing else None,
    }


def _introduction(layout: Layout, path: str | os.PathLike) -> str:
    """Return what was found in the model, and below it what was not."""
    streams = f"{layout.streams} stream{'s' * (layout.streams > 1)}"
    parts = [f"{len(layout.sites)} residual sites of {streams}"]
    if layout.routers:
        learned = sum(not r.hashed for r in layout.routers)
        hashed = len(layout.routers) - learned
        parts.append(f"{learned} learned routers" + (f" and {hashed} by hash" if hashed else ""))
        parts.append(f"{layout.routers[0].experts} experts a layer")
    found = f"geodiag watches a {layout.family} model: {', '.join(parts)}; recording to {path}"
    return "\n".join([found, *(f"  {line}" for line in layout.missing)])
