"""One instrumented training of a reference model: what `geodiag train` and `geodiag demo` run."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geodiag.cli.torchrun import Place
from geodiag.cli.train_options import Options
from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    import torch

    from geodiag.hooks.monitor import Monitor
    from geodiag.hooks.record.step_observer import Observation
    from geodiag.hooks.snapshots.snapshots import Snapshots
    from geodiag.reference_models.data import Batch, Loader

PROBE_STEP = 1 << 30
"""The probe batch is the batch of a step that no training reaches."""
_STATES = 3
"""A weight, its gradient and its momentum: the least that a parameter takes while it trains."""


class Training:
    """Everything a training needs, made from `Options`; iterate `steps()`, then `close`.

    GeodiagError for whatever the user can mend: unknown size, fault or device, data that is not
    there, a run folder that is taken or cannot be written.
    """

    def __init__(self, options: Options, quiet: bool = False) -> None:
        import torch

        from geodiag.hooks.adapters import find_layout
        from geodiag.hooks.attach import attach
        from geodiag.hooks.faults import Fault, Faults
        from geodiag.hooks.probes.batch import PROBE_TOKENS
        from geodiag.hooks.probes.token_trace import parse_trace
        from geodiag.hooks.routing.factory import create_routing
        from geodiag.metrics.cadence import parse_every
        from geodiag.reference_models.train import Trainer
        from geodiag.run import looks_like_a_run
        from geodiag.store.files import Folder

        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch asks for
        self.place = Place(options.device)
        options = replace(
            options, device=self.place.device_name, run=Path(self.place.same(str(options.run)))
        )
        self.options = options
        planned = [Fault.parse(text) for text in options.inject]
        late = [f for f in planned if f.step >= options.steps]
        if late:
            raise GeodiagError(
                f"{late[0].kind}@{late[0].step} comes after the last step; pass --steps {late[0].step + 50}"
            )
        if (
            self.place.world > 1
            and options.parallel == "fsdp"
            and any(f.kind == "grad-scale" for f in planned)
        ):
            raise GeodiagError(
                "grad-scale cannot be planted in sharded weights; pass --parallel ddp"
            )
        policy = options.policy()
        if not options.resume and looks_like_a_run(Folder.of(options.run)):
            raise GeodiagError(
                f"{options.run} already holds a run; pass another --run, or move it away"
            )
        self.device = _device(options.device)
        share = self.place.share(options.sequences, options.micro_batches)
        model_config, train_config, corpus = _plan(replace(options, sequences=share), self.device)
        torch.manual_seed(options.seed)
        self.model = _model(model_config, self.device)
        self.trainer = Trainer(
            self.model, train_config, self.place.spread(self.model, options.parallel)
        )
        self.loader = _loader(corpus, options, model_config.sequence)
        # Before the run directory is made: a fault that cannot be planted leaves nothing behind.
        self.faults = Faults(planned, find_layout(self.model), self._tell)
        self.routing = create_routing(
            options.routing_mode,
            self.model,
            options.delay,
            forward=lambda model, batch: model(self._to_device(batch).token_ids_BS),
            micro_batches=options.micro_batches,
        )
        self.snapshots = _snapshots(options, self.model, self.trainer)
        if self.snapshots is not None:
            self.snapshots.resume_only["faults"] = self.faults
        probe = self._to_device(self.place.mine(self.loader.batch(PROBE_STEP)))
        self.monitor: Monitor = attach(
            self.model,
            self.trainer.optimizers,
            options.run,
            routing=self.routing,
            policy=policy,
            snapshots=self.snapshots,
            resume=options.resume,
            probe=(probe.token_ids_BS[:, : max(1, PROBE_TOKENS // len(probe.domain_B))],),
            probe_domains=probe.domain_B,
            probe_every=options.probe_every,
            every=parse_every(options.every),
            layers=options.layers,
            trace=parse_trace(options.trace),
            micro_batches=options.micro_batches,
            config=_recorded(options, model_config, train_config, corpus),
            quiet=quiet,
        )

    def steps(self) -> Iterator["Observation | None"]:
        """Trains step by step; yields what is known of the newest step that is through."""
        import torch

        try:
            with closing(_Data(self.loader, self._parts)) as data:
                yield from self._trained(data)
        except torch.OutOfMemoryError:
            fix = "pass fewer --sequences, or more --micro-batches"
            raise GeodiagError(
                f"out of memory on {self.device} at step {self.trainer.steps_done}; {fix}"
            ) from None

    def _trained(self, data: "_Data") -> Iterator["Observation | None"]:
        for batch in self.monitor.batches(data):
            if self.trainer.first:
                self._plant(self.trainer.steps_done)
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
        """Closes the run; what was recorded stays."""
        self.monitor.close(status)
        self.routing.remove()
        self.faults.remove()
        self.place.leave()

    def _tell(self, kind: str, message: str, **more: Any) -> None:
        self.monitor.event(kind, message, **more)

    def _plant(self, step: int) -> None:
        if self.snapshots is not None and any(step in f.planted for f in self.faults.faults):
            self.snapshots.settle()  # a fault changes weights that may still be being copied
        self.faults.before_step(step)
        self.trainer.lr_scale = self.faults.lr_scale

    def _parts(self, batch: "Batch") -> list["Batch"]:
        """A step's micro-batches, as they are before routing sees them: ids are captured for what
        is trained on.
        """
        tokens = self.faults.batch(batch.step, batch.token_ids_BS, self.model.config.vocab)
        return self.place.mine(batch._replace(token_ids_BS=tokens)).split(
            self.options.micro_batches
        )

    def _to_device(self, batch: "Batch") -> "Batch":
        return batch if self.device.type == "cpu" else batch.to(self.device)


class _Data:
    """The loader's batches in micro-batches; where it stands is where the loader does, between
    steps.
    """

    def __init__(self, loader: "Loader", parts: Callable[["Batch"], list["Batch"]]) -> None:
        self._loader, self._parts = loader, parts
        self._making: Generator[Batch] | None = None

    def __iter__(self) -> Iterator["Batch"]:
        self._making = self._micro_batches()
        return self._making

    def _micro_batches(self) -> Generator["Batch"]:
        for batch in self._loader:
            yield from self._parts(batch)

    def close(self) -> None:
        if self._making is not None:
            self._making.close()

    def state_dict(self) -> dict[str, int]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._loader.load_state_dict(state)


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        why = str(e).splitlines()[0].split(" device type at start of device string")[0].rstrip(".")
        raise GeodiagError(f"no device {name!r} here ({why}); pass --device cpu") from None
    return device


def _plan(options: Options, device: "torch.device") -> tuple[Any, Any, Any]:
    from geodiag.reference_models.config import sized
    from geodiag.reference_models.text import open_corpus
    from geodiag.reference_models.train import TrainConfig

    try:
        corpus = open_corpus(options.data)
        config = sized(
            options.size,
            options.residual,  # type: ignore[arg-type]
            swiglu_limit=options.clamp,
            kernels=options.kernels,
        )
        config = replace(
            config,
            vocab=max(config.vocab, corpus.vocab),
            recompute=options.recompute or config.recompute,  # type: ignore[arg-type]
            dtype=config.dtype if device.type == "cuda" else "float32",
        )
        train = TrainConfig(
            steps=options.steps,
            sequences=options.sequences,
            micro_batches=options.micro_batches,
            lr=TrainConfig.lr if options.lr is None else options.lr,
            deterministic=options.deterministic,
        )
    except FileNotFoundError as e:
        raise GeodiagError(str(e)) from None
    except OSError as e:
        raise GeodiagError(
            f"cannot read {e.filename or options.data}: {e.strerror}; pass data you may read"
        ) from None
    except ValueError as e:
        raise GeodiagError(str(e)) from None
    if options.kernels == "triton" and device.type != "cuda":
        raise GeodiagError(
            f"Triton kernels need a GPU, and this is {device}; pass --kernels reference"
        )
    return config, train, corpus


def _model(config: Any, device: "torch.device") -> Any:
    import torch

    from geodiag.reference_models.transformer import Transformer

    with torch.device("meta"):
        weights = sum(p.numel() * p.element_size() for p in Transformer(config).parameters())
    need, have = _STATES * weights, _memory(device)
    if need > have:
        sizes = f"{need / 1e9:,.0f} GB for weights, gradients and optimizer, and {device} has {have / 1e9:,.0f}"
        raise GeodiagError(f"the model needs {sizes}; pass a smaller --size")
    try:
        with device:
            return Transformer(config)
    except torch.OutOfMemoryError:
        raise GeodiagError(f"the model does not fit on {device}; pass a smaller --size") from None


def _memory(device: "torch.device") -> float:
    """Bytes that the device could hold at most."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    known = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", ()))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else float("inf")


def _loader(corpus: Any, options: Options, sequence: int) -> Any:
    from geodiag.reference_models.data import Loader

    try:
        return Loader(corpus, options.sequences, sequence, options.seed)
    except ValueError as e:
        raise GeodiagError(f"{options.data}: {e}") from None


def _snapshots(options: Options, model: Any, trainer: Any) -> "Snapshots | None":
    """What a rollback or a resume needs, if the options ask for either."""
    from geodiag.hooks.snapshots.snapshots import Snapshots

    if options.rollback == "none":
        return None
    budget = None if options.snapshot_bytes is None else int(options.snapshot_bytes)
    where: Any = options.rollback
    try:
        things = (model, trainer.optimizers, trainer.progress)
        return Snapshots(*things, every=options.snapshot_every, where=where, max_bytes=budget)
    except ValueError as e:
        raise GeodiagError(str(e)) from None


def _recorded(options: Options, model: Any, train: Any, corpus: Any) -> dict[str, Any]:
    return {
        "options": options.recorded(),
        "model": asdict(model),
        "train": asdict(train),
        "data": {"domains": {d: len(t) for d, t in corpus.domains.items()}, "vocab": corpus.vocab},
    }
