"""attach: find a model's sites, routers and experts, say what was found, and begin its run."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters import Layout, find_layout
from geodiag.hooks.anticipatory import AnticipatoryRouting
from geodiag.hooks.controller import Controller
from geodiag.hooks.gradients import optimizers_in
from geodiag.hooks.monitor import Monitor
from geodiag.hooks.ranks import Ranks
from geodiag.run import Run

_COUNTERFACTUAL = ("clamp_gate_rate", "clamp_up_high_rate", "clamp_up_low_rate")
"""What an unclamped model would have had clamped."""


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    path: str | os.PathLike,
    *,
    routing: AnticipatoryRouting | None = None,
    policy: str | None = None,
    controller: Controller | None = None,
    probe: tuple | Mapping[str, Any] | None = None,
    probe_every: int = 10,
    every: int = 1,
    sample: int = 1024,
    micro_batches: int = 1,
    first_step: int = 0,
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Monitor:
    """Watches `model` and records every step of its training in the run directory `path`.

    Finds the model's residual sites, routers and experts by itself and says what it found. Call `step(loss)` on what
    is returned after every optimizer step. In a training of several ranks every rank does both, after
    torch.distributed.init_process_group and before or after DDP or `fully_shard`.

    routing: an AnticipatoryRouting that the controller may switch; policy `off` (the default), `auto` or `on` says
    whether it may, or the controller you pass does.
    probe: arguments of a fixed batch for flip rates; without it, the first batch. probe_every: steps between probes.
    every: steps between samples of the layers. sample: tokens a micro-batch for per-token products.
    micro_batches: of a step. More are found by themselves, except inside a compiled model.

    GeodiagError where the model has no blocks to watch, or `path` cannot be written.
    """
    if min(probe_every, every, sample, micro_batches) < 1:
        raise ValueError("probe_every, every, sample and micro_batches are at least 1")
    optimizers = optimizers_in(optimizer)
    layout = find_layout(model)
    ranks = Ranks.join()
    ranks.same("model", {k: v for k, v in layout.summary().items() if k != "missing"})
    controller = controller or Controller()
    policy = policy or controller.policy
    controller.set_policy(policy)
    if ranks.strangers and policy != "off":
        raise GeodiagError(
            f"routing {policy} on {ranks.world} ranks needs them to agree; "
            "call torch.distributed.init_process_group before attach"
        )
    if routing is None and policy != "off":
        raise GeodiagError(f"routing {policy} needs an AnticipatoryRouting; pass attach(..., routing=...)")
    unclamped = any(e.gate_limit is None for e in layout.experts)

    def create(attempt: int | None) -> Run:
        return Run.create(
            path,
            found=layout.summary(),
            config={
                "routing": {"policy": policy, "delay_steps": routing.delay_steps if routing else None},
                **(config or {}),
            },
            counterfactual=_COUNTERFACTUAL if unclamped else (),
            rank=ranks.rank,
            world_size=ranks.world,
            attempt=attempt,
        )

    run = ranks.begin(create, attempt_of=lambda made: made.attempt, undo=lambda made: made.close("failed"))
    if not quiet and ranks.rank == 0:
        print(_introduction(layout, path), file=sys.stderr, flush=True)
    try:
        return Monitor(
            model,
            optimizers,
            run,
            layout,
            routing=routing,
            controller=controller,
            probe=probe,
            probe_every=probe_every,
            every=every,
            sample=sample,
            micro_batches=micro_batches,
            first_step=first_step,
            ranks=ranks,
        )
    except BaseException as e:  # also Ctrl-C: a run whose watch never began must not say that it runs
        run.close("interrupted" if isinstance(e, KeyboardInterrupt) else "failed")
        raise


def _introduction(layout: Layout, path: str | os.PathLike) -> str:
    learned = sum(not r.hashed for r in layout.routers)
    hashed = len(layout.routers) - learned
    parts = [f"{len(layout.sites)} residual sites of {layout.streams} stream{'s' * (layout.streams > 1)}"]
    if layout.routers:
        parts.append(f"{learned} learned routers" + (f" and {hashed} by hash" if hashed else ""))
        parts.append(f"{layout.routers[0].experts} experts a layer")
    lines = [f"geodiag watches a {layout.family} model: {', '.join(parts)}; recording to {path}"]
    return "\n".join(lines + [f"  {m}" for m in layout.missing])
