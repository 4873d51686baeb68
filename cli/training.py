"""One recorded training of a reference model: what `geodiag train` and `geodiag demo` run."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geodiag.cli.micro_batches import MicroBatches
from geodiag.cli.model_setup import Setup, build_loader, build_model, configure, find_device
from geodiag.cli.torchrun import RankInfo
from geodiag.cli.train_options import Options
from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    from geodiag.hooks.control.policy import Policy
    from geodiag.hooks.faults import Fault
    from geodiag.hooks.monitor import Monitor
    from geodiag.hooks.record.step_observer import Observation
    from geodiag.hooks.routing.base import Rerouting
    from geodiag.reference_models.data import Batch

PROBE_STEP = 1 << 30
"""The probe batch is the batch of a step that no training reaches."""


class Training:
    """A training made from `Options`: iterate over `steps()`, then call `close`.

    GeodiagError for everything that the user can fix: an unknown size, fault or device, missing
    data, a run directory that holds a run already or cannot be written.
    """

    def __init__(self, options: Options, quiet: bool = False) -> None:
        import torch

        from geodiag.hooks.adapters import find_layout
        from geodiag.hooks.faults import Fault, Faults
        from geodiag.reference_models.train import Trainer

        if options.deterministic:
            # cuBLAS computes repeatable results only with this workspace; torch demands it.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.rank_info = RankInfo(options.device)
        run = Path(self.rank_info.broadcast(str(options.run)))
        self.options = options = replace(options, device=self.rank_info.device_name, run=run)

        # Everything that can be refused is refused before the run directory is made.
        faults = [Fault.parse(text) for text in options.inject]
        self._check_faults(faults)
        policy = options.policy()
        self._check_run_folder()

        self.device = find_device(options.device)
        share = self.rank_info.share(options.sequences, options.micro_batches)
        setup = configure(options, share, self.device)
        torch.manual_seed(options.seed)
        self.model = build_model(setup.model, self.device)
        called_model = self.rank_info.parallelize(self.model, options.parallel)
        self.trainer = Trainer(self.model, setup.train, called_model)
        self.loader = build_loader(setup.corpus, options, setup.model.sequence)

        self.faults = Faults(faults, find_layout(self.model), self._record_event)
        self.routing = self._build_routing()
        self.snapshots = options.snapshots(
            self.model, self.trainer.optimizers, self.trainer.progress
        )
        if self.snapshots is not None:
            self.snapshots.resume_only["faults"] = self.faults
        self.monitor = self._attach(policy, setup, quiet)

    def _check_faults(self, faults: list["Fault"]) -> None:
        options = self.options
        for fault in faults:
            if fault.step >= options.steps:
                raise GeodiagError(
                    f"{fault.kind}@{fault.step} comes after the last step; "
                    f"pass --steps {fault.step + 50}"
                )
        sharded = self.rank_info.world > 1 and options.parallel == "fsdp"
        if sharded and any(f.kind == "grad-scale" for f in faults):
            raise GeodiagError(
                "grad-scale cannot be planted in sharded weights; pass --parallel ddp"
            )

    def _check_run_folder(self) -> None:
        from geodiag.store.files import Folder
        from geodiag.store.run_folder import looks_like_a_run

        run = self.options.run
        if not self.options.resume and looks_like_a_run(Folder.of(run)):
            raise GeodiagError(f"{run} already holds a run; pass another --run, or move it away")

    def _build_routing(self) -> "Rerouting":
        from geodiag.hooks.routing.factory import create_routing

        return create_routing(
            self.options.routing_mode,
            self.model,
            self.options.delay,
            forward=lambda model, batch: model(self._to_device(batch).token_ids_BS),
            micro_batches=self.options.micro_batches,
        )

    def _attach(self, policy: "Policy", setup: Setup, quiet: bool) -> "Monitor":
        from geodiag.hooks.attach import attach
        from geodiag.hooks.probes.batch import PROBE_TOKENS
        from geodiag.hooks.probes.token_trace import parse_trace
        from geodiag.metrics.cadence import parse_every

        options = self.options
        probe = self._to_device(self.rank_info.local_part(self.loader.batch(PROBE_STEP)))
        probe_length = max(1, PROBE_TOKENS // len(probe.domain_B))
        return attach(
            self.model,
            self.trainer.optimizers,
            options.run,
            routing=self.routing,
            policy=policy,
            snapshots=self.snapshots,
            resume=options.resume,
            probe=(probe.token_ids_BS[:, :probe_length],),
            probe_domains=probe.domain_B,
            probe_every=options.probe_every,
            every=parse_every(options.every),
            layers=options.layers,
            trace=parse_trace(options.trace),
            micro_batches=options.micro_batches,
            config=_manifest_config(options, setup),
            quiet=quiet,
        )

    def steps(self) -> Iterator["Observation | None"]:
        """Train step by step; yield the observation of the newest recorded step after each."""
        import torch

        try:
            with closing(MicroBatches(self.loader, self._split)) as data:
                yield from self._train(data)
        except torch.OutOfMemoryError:
            fix = "pass fewer --sequences, or more --micro-batches"
            raise GeodiagError(
                f"out of memory on {self.device} at step {self.trainer.steps_done}; {fix}"
            ) from None

    def _train(self, data: MicroBatches) -> Iterator["Observation | None"]:
        for batch in self.monitor.batches(data):
            if self.trainer.first:
                self._plant_faults(self.trainer.steps_done)
            self.trainer.accumulate(self._to_device(batch))
            if not self.trainer.ready:
                continue
            done = self.trainer.update()
            self.monitor.step(
                done.loss,
                grad_norm=done.grad_norm,
                lr=done.lr,
                domains=done.domain_B,
                sequence_losses=done.sequence_losses_B,
            )
            yield self.monitor.last
            if self.trainer.steps_done >= self.options.steps:
                return

    def close(self, status: Any = "finished") -> None:
        """Close the run; what was recorded stays."""
        self.monitor.close(status)
        self.routing.remove()
        self.faults.remove()
        self.rank_info.leave()

    def _record_event(self, kind: str, message: str, **details: Any) -> None:
        self.monitor.event(kind, message, **details)

    def _plant_faults(self, step: int) -> None:
        if self.snapshots is not None and any(step in f.planted for f in self.faults.faults):
            self.snapshots.settle()  # a fault changes weights that may still be being copied
        self.faults.before_step(step)
        self.trainer.lr_scale = self.faults.lr_scale

    def _split(self, batch: "Batch") -> list["Batch"]:
        """Return this rank's micro-batches of a step.

        Faults of the batch come first: routing captures expert ids for the tokens that are trained
        on.
        """
        tokens = self.faults.batch(batch.step, batch.token_ids_BS, self.model.config.vocab)
        mine = self.rank_info.local_part(batch._replace(token_ids_BS=tokens))
        return mine.split(self.options.micro_batches)

    def _to_device(self, batch: "Batch") -> "Batch":
        return batch if self.device.type == "cpu" else batch.to(self.device)


def _manifest_config(options: Options, setup: Setup) -> dict[str, Any]:
    """Return what run.json holds about the training."""
    tokens = {domain: len(ids) for domain, ids in setup.corpus.domains.items()}
    return {
        "options": options.manifest(),
        "model": asdict(setup.model),
        "train": asdict(setup.train),
        "data": {"domains": tokens, "vocab": setup.corpus.vocab},
    }
