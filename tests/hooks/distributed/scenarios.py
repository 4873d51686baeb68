"""What the ranks of the two-rank tests do. `launch.ranks` starts this module once a rank.

What the scenarios return is written to said-RANK.json.
"""

import json
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import geodiag
from geodiag.errors import GeodiagError
from geodiag.hooks.control.policy import Policy
from geodiag.hooks.distributed import rank_exchange as ranks_module
from geodiag.hooks.measure import formulas as metrics
from geodiag.hooks.monitor import Monitor
from geodiag.hooks.probes import perturbation_growth as growth
from geodiag.hooks.probes import probe_metrics
from geodiag.hooks.record.step_writer import StepMetadata
from geodiag.hooks.snapshots.disk_store import folder_of
from geodiag.hooks.step_recording import FinishedStep, StepRecording
from geodiag.reference_models.data import Batch
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer
from tests.hooks.small import SEQUENCES, config, tokens

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
BREAKOUT = 24
"""The step at which a scenario's loss goes up, if it does."""


def made(parallel: str, **changes: Any) -> Trainer:
    """The same small model on every rank, spread as asked for; `apart`: nothing but geodiag links
    the ranks.
    """
    torch.manual_seed(0)
    model = Transformer(config(**changes))
    forward: nn.Module | None = None
    if parallel == "ddp" and WORLD > 1:
        forward = DistributedDataParallel(model)
    elif parallel == "fsdp" and WORLD > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    train = TrainConfig(steps=50, sequences=SEQUENCES, warmup=5, lr=1e-2)
    trainer = Trainer(model, train, forward)
    if parallel == "apart":
        trainer._balance = lambda: None  # type: ignore[method-assign]
    return trainer


def share(step: int) -> Batch:
    """This rank's half of the step's batch."""
    ids = tokens(step)[RANK::WORLD]
    return Batch(step, ids[:, :-1], ids[:, 1:], ("x",) * len(ids))


def train(t: Trainer, run: Monitor, steps: range) -> list[float]:
    """Trains on this rank's shares; the losses bit for bit."""
    losses = []
    for step in steps:
        t.accumulate(share(step))
        done = t.update()
        losses.append(float(done.loss))
        run.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
    return losses


# -- scenarios -----------------------------------------------------------------------------------


def record(folder: Path, parallel: str) -> dict[str, Any]:
    """A training of a few steps, watched."""
    t = made(parallel)
    with geodiag.attach(
        t.model, t.optimizers, folder / "run", probe=(tokens(999)[:, :-1],), probe_every=2
    ) as run:
        losses = train(t, run, range(6))
    return {"losses": losses, "seen": run.last.loss if run.last else None}


def unwatched(folder: Path, parallel: str) -> dict[str, Any]:
    """The same without geodiag."""
    t, losses = made(parallel), []
    for step in range(6):
        t.accumulate(share(step))
        losses.append(float(t.update().loss))
    return {"losses": losses}


def steer(folder: Path, parallel: str) -> dict[str, Any]:
    """Routing auto with rollback: only rank 0's loss rises, and all ranks must act alike."""
    t = made(parallel)
    routing = geodiag.AnticipatoryRouting(
        t.model,
        2,
        forward=lambda model, batch: (t.forward if parallel == "ddp" else model)(
            batch.token_ids_BS
        ),
    )
    snapshots = geodiag.Snapshots(t.model, t.optimizers, t.progress, every=4)
    policy = Policy.parse("rollback,route", mode="auto", period=5, cooldown=5)
    run = geodiag.attach(
        t.model,
        t.optimizers,
        folder / "run",
        routing=routing,
        snapshots=snapshots,
        policy=policy,
        probe_every=4,
    )
    modes, seen, raised = [], [], False
    with run:
        for batch in run.batches(share(step) for step in range(60)):
            step = run.next_step
            t.accumulate(batch)
            done = t.update()
            spikes = RANK == 0 and not raised and step >= BREAKOUT
            modes.append((step, routing.mode, routing.lag, batch.step))
            run.step(done.loss + 8.0 * spikes, grad_norm=done.grad_norm, lr=done.lr)
            seen.append(float(done.loss))
            raised = raised or run.next_step <= step
            if run.next_step >= 40:
                break
    weights = sum(
        float(p.detach().to_local().sum() if parallel == "fsdp" else p.detach().sum())
        for p in t.model.parameters()
    )
    return {"modes": modes, "losses": seen, "weights": weights}


def resumed(folder: Path, option: str) -> dict[str, Any]:
    """A training with snapshots of steps 8 and 12 on disk; something of rank 1's gets lost, and
    both are to go on.
    """
    parallel, _, accident = option.partition("-")

    def twelve(resume: bool) -> tuple[int, list[float]]:
        t, losses = made(parallel), []
        snapshots = geodiag.Snapshots(
            t.model, t.optimizers, t.progress, every=4, where="disk", keep=2
        )
        with geodiag.attach(
            t.model, t.optimizers, folder / "run", snapshots=snapshots, resume=resume
        ) as run:
            began = run.next_step
            for batch in run.batches(share(step) for step in range(13)):
                t.accumulate(batch)
                losses.append(float(t.update().loss))
                run.step(losses[-1])
                if run.next_step == 12:
                    break
        return began, losses

    _, before = twelve(resume=False)
    mine = folder_of(folder / "run", RANK)
    if RANK == 1 and accident == "damaged":
        for file in (mine / "step-00000012").glob("*.distcp"):
            file.write_bytes(b"nothing")
    elif RANK == 1:
        shutil.rmtree(mine / "step-00000012" if accident == "newest" else mine)
    dist.barrier()
    try:
        began, after = twelve(resume=True)
    except GeodiagError as e:
        return {"error": str(e)}
    return {"began": began, "before": before, "after": after}


def asked(folder: Path, parallel: str) -> dict[str, Any]:
    """Somebody asks rank 0's folder for routing on, and later off."""
    t = made(parallel)
    routing = geodiag.AnticipatoryRouting(
        t.model, 2, forward=lambda model, batch: model(batch.token_ids_BS)
    )
    modes = []
    with geodiag.attach(t.model, t.optimizers, folder / "run", routing=routing) as run:
        for batch in routing.batches(share(step) for step in range(16)):
            if RANK == 0 and batch.step in (2, 9):
                geodiag.open_run(folder / "run").request(
                    "on" if batch.step == 2 else "off", by="test"
                )
            t.accumulate(batch)
            done = t.update()
            modes.append((batch.step, routing.mode))
            run.step(done.loss)
    return {"modes": modes}


def broken_inside(folder: Path, parallel: str) -> dict[str, Any]:
    """On rank 1 everything in geodiag fails at the steps 3 to 5, but for the probes."""
    t = made(parallel)
    run = geodiag.attach(t.model, t.optimizers, folder / "run", probe_every=2)
    metadata = StepRecording._metadata

    def fails(self: StepRecording, finished: FinishedStep, absent: tuple[str, ...]) -> StepMetadata:
        if RANK == 1 and 3 <= finished.step <= 5:
            raise ZeroDivisionError("on purpose")
        return metadata(self, finished, absent)

    StepRecording._metadata = fails  # type: ignore[method-assign]
    with run:
        losses = train(t, run, range(10))
    StepRecording._metadata = metadata  # type: ignore[method-assign]
    return {"losses": losses}


def broken_probe(folder: Path, parallel: str) -> dict[str, Any]:
    """On rank 1 every probe fails at its own place: in the look's hooks, between two layers'
    weights, in a forward.
    """

    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("on purpose")

    t = made(parallel)
    every = dict.fromkeys(
        ("tear", "curvature", "perturbation", "spectral_norm_router", "spectral_norm_gate"), 2
    )
    with (
        geodiag.attach(t.model, t.optimizers, folder / "run", probe_every=2, every=every) as run,
        ExitStack() as patches,
    ):
        places = [
            (probe_metrics, "tear"),
            (probe_metrics, "curvature"),
            (growth, "_perturbed"),
            (metrics, "power_step"),
        ]
        for module, name in [*places, (metrics, "margins")] if RANK == 1 else []:
            patches.enter_context(mock.patch.object(module, name, fails))
        return {"losses": train(t, run, range(6))}


def halfway(folder: Path, what: str) -> dict[str, Any]:
    """Rank 1 cannot end a forward that geodiag runs on sharded weights: of a probe, or of a
    capture.
    """
    t = made("fsdp")
    routing = geodiag.AnticipatoryRouting(
        t.model, 2, forward=lambda model, batch: model(batch.token_ids_BS)
    )

    def fails(*_: Any) -> None:
        if t.steps_done >= 3 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("on purpose")

    if RANK == 1:
        t.model.blocks[1].moe.register_forward_pre_hook(fails)
    run = geodiag.attach(
        t.model,
        t.optimizers,
        folder / "run",
        routing=routing,
        probe_every=3 if what == "probe" else 50,
    )
    error = None
    try:
        with run:
            for batch in routing.batches(share(step) for step in range(12)):
                if what == "capture" and batch.step == 2:
                    routing.enable()
                t.accumulate(batch)
                done = t.update()
                run.step(done.loss)
    except GeodiagError as e:
        error = str(e)
    return {"error": error}


def one_nan(folder: Path, parallel: str) -> dict[str, Any]:
    """Rank 1 alone has a loss that is not finite."""
    t = made(parallel)
    active = []
    with geodiag.attach(t.model, t.optimizers, folder / "run") as run:
        for step in range(6):
            t.accumulate(share(step))
            done = t.update()
            run.step(done.loss * (float("nan") if RANK == 1 and step == 4 else 1.0))
            active.append(bool(run.last and run.last.verdict.active))
    return {"active": active}


def killed(folder: Path, policy: str) -> dict[str, Any]:
    """Rank 1 is killed with kill -9 in the middle of a step."""
    t = made("apart")
    routing = geodiag.AnticipatoryRouting(
        t.model, 2, forward=lambda model, batch: model(batch.token_ids_BS)
    )
    run = geodiag.attach(t.model, t.optimizers, folder / "run", routing=routing, policy=policy)
    done = []
    with run:
        for step in range(12):
            t.accumulate(share(step))
            if RANK == 1 and step == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            run.step(t.update().loss)
            done.append(step)
            (folder / f"done-{RANK}").write_text(str(step))
    return {"done": done}


def silent(folder: Path, policy: str) -> dict[str, Any]:
    """Rank 1 takes part in the training and forgets to call `step` from step 4 on."""
    timeout, ranks_module.TIMEOUT = ranks_module.TIMEOUT, timedelta(seconds=4)
    t = made("apart")
    routing = geodiag.AnticipatoryRouting(
        t.model, 2, forward=lambda model, batch: model(batch.token_ids_BS)
    )
    run = geodiag.attach(t.model, t.optimizers, folder / "run", routing=routing, policy=policy)
    error = None
    try:
        for step in range(8):
            t.accumulate(share(step))
            loss = t.update().loss
            if RANK == 0 or step < 4:
                run.step(loss)
    except GeodiagError as e:
        error = str(e)
    ranks_module.TIMEOUT = timeout
    dist.barrier()
    run.close()
    return {"error": error}


def refused(folder: Path, what: str) -> dict[str, Any]:
    """Rank 1 cannot begin: its folder is taken, there are snapshots of another training, or its
    model is another.
    """
    snapshots = None
    if what == "snapshots" and RANK == 1:
        (folder_of(folder / "run", RANK) / "step-00000004").mkdir(parents=True)
    if what == "folder" and RANK == 1:
        (folder / "run").mkdir(parents=True, exist_ok=True)
        (folder / "run" / "journal").write_text("no folder")
    dist.barrier()
    t = made("apart", **({"experts": 6} if what == "model" and RANK == 1 else {}))
    if what == "snapshots":
        snapshots = geodiag.Snapshots(t.model, where="disk")
    try:
        geodiag.attach(t.model, t.optimizers, folder / "run", snapshots=snapshots)
    except GeodiagError as e:
        return {"error": str(e)}
    return {}


def apart(folder: Path, parallel: str) -> dict[str, Any]:
    """Only rank 1 is given a controller's state."""
    t = made(parallel)
    routing = geodiag.AnticipatoryRouting(
        t.model, 2, forward=lambda model, batch: model(batch.token_ids_BS)
    )
    run = geodiag.attach(t.model, t.optimizers, folder / "run", routing=routing, policy="auto")
    if RANK == 1:
        state = run.state_dict()
        run.load_state_dict(state | {"controller": state["controller"] | {"activations": 3}})
    try:
        train(t, run, range(4))
    except GeodiagError as e:
        return {"error": str(e), "step": run.next_step}
    finally:
        run.close()
    return {}


def main() -> None:
    folder = Path(sys.argv[1])
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    said = {}
    for scenario in sys.argv[2:]:
        name, _, option = scenario.partition(":")
        (folder / scenario).mkdir(exist_ok=True)
        said[scenario] = globals()[name](folder / scenario, option)
        (folder / f"said-{RANK}.json").write_text(json.dumps(said))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
