"""build_monitor: the parts of a monitor, built bottom-up and handed to one another."""

from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from geodiag.control import RequestWatch
from geodiag.hooks.adapters import Layout
from geodiag.hooks.control.controller import Controller
from geodiag.hooks.control.interventions import Interventions
from geodiag.hooks.control.policy import Policy
from geodiag.hooks.control.rank_consensus import RankConsensus
from geodiag.hooks.control.steering import Steering
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.monitor import Monitor
from geodiag.hooks.record.recorder import Recorder
from geodiag.hooks.rewind import Rewind
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.snapshots.rollback import Rollback
from geodiag.hooks.snapshots.snapshots import Snapshots
from geodiag.hooks.step_context import StepContext
from geodiag.hooks.step_measurement import MeasurementPlan, StepMeasurement
from geodiag.hooks.step_recording import StepRecording
from geodiag.run import Run


def build_monitor(
    model: nn.Module,
    optimizers: list[Optimizer],
    run: Run,
    layout: Layout,
    plan: MeasurementPlan,
    ranks: Ranks,
    *,
    routing: Rerouting | None,
    policy: Policy,
    snapshots: Snapshots | None,
    first_step: int,
) -> Monitor:
    """Build the parts of a monitor, each from those before it."""
    interventions = Interventions(optimizers, layout, policy)
    context = StepContext(first_step)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    recorder = Recorder(run, layout, device, ranks, context)
    world = 1 if ranks.single_process else ranks.world
    measurement = StepMeasurement(
        model,
        optimizers,
        layout,
        plan,
        recorder.guard,
        anticipatory=lambda: routing is not None and routing.replaying,
        ranks=world,
    )
    rollback = Rollback(snapshots, routing)
    rewind = Rewind(context, recorder, measurement, rollback)
    delay_steps = routing.delay_steps if routing else 0
    steering = Steering(
        routing,
        Controller(policy=policy, delay_steps=delay_steps),
        interventions,
        ranks,
        record_event=recorder.event,
        go_back=rewind.go_back,
    )
    recording = StepRecording(
        context=context,
        ranks=ranks,
        recorder=recorder,
        measurement=measurement,
        rollback=rollback,
        steering=steering,
        consensus=RankConsensus(ranks, steering, RequestWatch(Path(run.url))),
    )
    return Monitor(model, layout, run, recording, rewind)
