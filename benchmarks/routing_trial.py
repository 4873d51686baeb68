"""One training of `geodiag bench routing`: a scenario, an arm and a seed."""

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import geodiag
from geodiag.events import details
from geodiag.hooks.adapters import find_layout
from geodiag.hooks.attach import attach
from geodiag.hooks.control.policy import Mode, Policy
from geodiag.hooks.faults import Fault, Faults
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.routing.factory import create_routing
from geodiag.hooks.snapshots.snapshots import Snapshots
from geodiag.reference_models.config import sized
from geodiag.reference_models.data import Batch, Loader
from geodiag.reference_models.text import Corpus, open_corpus
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer

DELAY = 8
FLIPS = ("flip_rate", "flip_rate_anticipatory", "flip_rate_router")
PERIOD = 50
RAISED_AT = 90
_NEVER = 1 << 30
_ROOM = 16 << 30
"""Bytes for snapshots; how many there are must not hang on who else runs on the machine."""
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to respond to a spike."""

    name: str
    mode: Mode = "auto"
    actions: str = "route"
    variant: str = "anticipatory"
    delay: int = DELAY
    noise: float = 0.0
    """Every weight times 1 + this · N(0, 1) after going back: what a change that means nothing
    does.
    """


ARMS = {
    a.name: a
    for a in (
        Arm(name="none", mode="off"),
        Arm(name="rollback", actions="rollback"),
        Arm(name="rollback + noise", actions="rollback,route", variant="unchanged", noise=1e-6),
        Arm(name="rollback + anticipatory", actions="rollback,route"),
        Arm(name="anticipatory", actions="route"),
        Arm(name="router-lag", actions="route", variant="router-lag"),
        Arm(name="rollback + router-lag", actions="rollback,route", variant="router-lag"),
        Arm(name="rollback + skip-batch", actions="rollback,skip-batch"),
        Arm(name="rollback + lower-lr", actions="rollback,lower-lr=0.5"),
        Arm(name="rollback + anticipatory + lower-lr", actions="rollback,route,lower-lr=0.5"),
        Arm(name="always anticipatory", mode="on"),
        Arm(name="always anticipatory, Δ = 1", mode="on", delay=1),
        Arm(name="always anticipatory, Δ = 32", mode="on", delay=32),
        Arm(name="always router-lag", mode="on", variant="router-lag"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is trained, and what goes wrong in it."""

    name: str
    steps: int
    residual: str = "mhc"
    size: str = "tiny"
    lr: float = 3e-3
    clamp: float | None = 10.0
    fault: str | None = None
    raised: float = 1.0
    """Factor on the learning rate from step `RAISED_AT` on: a schedule that goes too high, and
    stays there.
    """
    turn: int = 0
    """Steps after which the data changes to the next domain, abruptly; 0 for all of them mixed."""
    sequences: int = 4
    deterministic: bool = False
    """Whether a GPU adds up alike every time, so that arms are one and the same training until the
    first answer.
    """

    @property
    def twin(self) -> "Scenario":
        """The same scenario without a planted fault."""
        clamp = "clamp" if self.clamp else "no clamp"
        size = "" if self.size == "tiny" else f"{self.size}, "
        return replace(
            self,
            name=f"{size}nothing planted, {self.steps} steps, {self.residual}, {clamp}",
            fault=None,
        )

    @property
    def onset(self) -> int:
        """The first step that can go wrong."""
        return Fault.parse(self.fault).step if self.fault else 0


class Domains(Loader):
    """One domain after another, each for so many steps. A batch is a function of its step."""

    def __init__(self, corpus: Corpus, scenario: Scenario, sequence: int, seed: int) -> None:
        super().__init__(corpus, scenario.sequences, sequence, seed)
        self._turn = scenario.turn
        alone = [
            Corpus({name: tokens}, corpus.vocab) for name, tokens in sorted(corpus.domains.items())
        ]
        self._each = [Loader(c, scenario.sequences, sequence, seed) for c in alone]

    def batch(self, step: int) -> Batch:
        return self._each[step // self._turn % len(self._each)].batch(step)


class Unchanged(Rerouting):
    """Changes no routing; a rollback goes back as far as with routing by weights of Δ steps ago."""

    variant = "unchanged"
    lag = queued = 0
    replaying = False

    def batches(self, source: Iterable[Any]) -> Iterator[Any]:
        return iter(source)

    def rewind(self) -> None:
        """Do nothing: no batch is prepared."""

    def state_dict(self) -> dict[str, Any]:
        return {"delay_steps": self.delay_steps, "mode": self.mode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""


@cache
def _corpus() -> Corpus:
    return open_corpus("stdlib")


def setup(scenario: Scenario, seed: int, where: torch.device = _CPU) -> tuple[Trainer, Loader]:
    """Return trainer and loader before the first step."""
    torch.manual_seed(seed)
    shape = sized(scenario.size, scenario.residual, swiglu_limit=scenario.clamp)  # type: ignore[arg-type]
    shape = replace(shape, dtype="float32" if where.type == "cpu" else "bfloat16")
    with where:
        model = Transformer(shape)
    # The learning rate hardly decays: what goes wrong should not heal by itself.
    config = TrainConfig(
        steps=4 * scenario.steps,
        sequences=scenario.sequences,
        lr=scenario.lr,
        deterministic=scenario.deterministic,
    )
    if scenario.turn:
        return Trainer(model, config), Domains(_corpus(), scenario, shape.sequence, seed)
    return Trainer(model, config), Loader(_corpus(), scenario.sequences, shape.sequence, seed)


@torch.no_grad()
def perturb(model: nn.Module, size: float, draw: int) -> None:
    """Multiply every weight by 1 + `size` · N(0, 1).

    A bfloat16 weight may round the change away; the float32 weights (routers, hyper-connections,
    norms) keep it.
    """
    for number, p in enumerate(model.parameters()):
        generator = torch.Generator(p.device).manual_seed(1000 * draw + number)
        p.mul_(1 + size * torch.randn(p.shape, generator=generator, device=p.device))


def train(scenario: Scenario, arm: Arm, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Train and return every executed step with its loss and records, and all settings."""
    where = torch.device(device)
    trainer, loader = setup(scenario, seed, where)
    model = trainer.model
    vocab = trainer.model.config.vocab
    faults = Faults([Fault.parse(scenario.fault)] if scenario.fault else [], find_layout(model))
    with tempfile.TemporaryDirectory() as folder:
        routing = _routing(arm, model)
        snapshots = None
        if "rollback" in arm.actions:
            snapshots = Snapshots(
                model, trainer.optimizers, trainer.progress, every=20, max_bytes=_ROOM
            )
        monitor = attach(
            model,
            trainer.optimizers,
            Path(folder) / "run",
            routing=routing,
            policy=Policy.parse(arm.actions, mode=arm.mode, period=PERIOD, cooldown=20, budget=6),
            snapshots=snapshots,
            probe=(loader.batch(1 << 30).token_ids_BS[:2].to(where),),
            every=dict.fromkeys(("layers", "experts", "matrices", "tokens", "domains"), _NEVER)
            | {"flip_rate": max(arm.delay, 1)},
            quiet=True,
        )
        executed: list[tuple[int, torch.Tensor]] = []

        def data() -> Iterator[Batch]:
            for batch in loader:
                tokens = faults.batch(batch.step, batch.token_ids_BS, vocab)
                yield batch._replace(token_ids_BS=tokens).to(where)

        with monitor:
            for batch in monitor.batches(data()):
                step = trainer.steps_done
                faults.before_step(step)
                trainer.lr_scale = faults.lr_scale * (scenario.raised if step >= RAISED_AT else 1.0)
                done = trainer.step(batch)
                executed.append((step, done.loss.detach()))
                monitor.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
                if arm.noise and monitor.next_step <= step:
                    perturb(model, arm.noise, monitor.run.attempt)
                if monitor.next_step >= scenario.steps or len(executed) >= 3 * scenario.steps:
                    break
        routing.remove()
        faults.remove()
        seen = _recorded(Path(folder) / "run")
    losses = torch.stack([loss for _, loss in executed]).tolist()
    return {
        "scenario": asdict(scenario),
        "onset": scenario.onset,
        "twin": scenario.twin.name,
        "arm": asdict(arm),
        "seed": seed,
        "steps": [step for step, _ in executed],
        "losses": [x if math.isfinite(x) else None for x in losses],
        **seen,
    }


def _routing(arm: Arm, model: Transformer) -> Rerouting:
    if arm.variant == Unchanged.variant:
        return Unchanged(model, arm.delay, micro_batches=1)
    return create_routing(arm.variant, model, arm.delay, forward=lambda m, b: m(b.token_ids_BS))


def _recorded(path: Path) -> dict[str, Any]:
    """Return events and flip rates of a run directory."""
    run = geodiag.open_run(path)
    recorded = run.read("events", attempt="all")
    kinds = (
        "spike",
        "divergence",
        "nonfinite",
        "outlier",
        "routing",
        "decision",
        "attempt",
        "problem",
    )
    events = [
        {
            "step": int(e["step"]),
            "kind": e["kind"],
            "message": e["message"],
            "data": details(e["data"]),
        }
        for e in recorded.to_dict("records")
        if e["kind"] in kinds
    ]
    broken = [e["message"] for e in events if e["kind"] == "problem"]
    if broken:
        # A controller without observations must not count as a controller that did not act.
        raise RuntimeError(broken[0])
    layers = run.read("layers", ["step", "layer", "site", *FLIPS], attempt="all")
    means = {n: layers[n].mean() for n in FLIPS}
    return {
        "events": events,
        "flips": {n: None if math.isnan(v) else float(v) for n, v in means.items()},
    }
