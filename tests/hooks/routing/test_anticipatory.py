"""Anticipatory routing: the ids of θ_{t−Δ} for the same batch, today's gate weights, and no trace
of looking ahead.
"""

import io
import random
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import geodiag
from geodiag.hooks.monitor import Monitor
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from geodiag.hooks.routing.isolated_forward import RouterChoices, isolated
from geodiag.reference_models.moe import HashRouter, Router
from geodiag.reference_models.train import Trainer
from tests.hooks import small
from tests.hooks.test_monitor import layers_equal

Ids = dict[int, Tensor]
Plan = dict[int, Callable[[AnticipatoryRouting], None]]
"""What is done to the routing before a step begins."""


class Jittery(nn.Module):
    """Randomness of three kinds and a buffer that moves: what a forward that leaves no trace must
    put back.
    """

    def __init__(self, replaced: bool = False) -> None:
        super().__init__()
        self.replaced = replaced
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.replaced:
            self.seen = self.seen + 1
        else:
            self.seen += 1
        noise = 1 + 0.05 * (random.random() + float(np.random.rand()))  # noqa: NPY002
        return torch.nn.functional.dropout(x, 0.2, self.training) * noise


def trainer(
    residual: str = "mhc", micro_batches: int = 1, jitter: bool = False, **changes: Any
) -> Trainer:
    t = small.trainer(residual, micro_batches, **changes)
    if jitter:
        for i, block in enumerate(t.model.blocks):
            block.attn_norm = nn.Sequential(block.attn_norm, Jittery(replaced=i == 0))  # type: ignore[assignment]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    return t


def routing_of(t: Trainer, delay: int) -> AnticipatoryRouting:
    return AnticipatoryRouting(
        t.model, delay, forward=lambda m, ids: m(ids[:, :-1]), micro_batches=t.config.micro_batches
    )


def source(t: Trainer, start: int = 0, steps: int | None = None) -> Iterator[Tensor]:
    """Micro-batches, (B, S+1) each, of `small.tokens`."""
    for step in islice(count(start), steps):
        yield from small.tokens(step).chunk(t.config.micro_batches)


class Seen:
    """One training under a plan, and all that can be told from outside."""

    def __init__(
        self, t: Trainer, routing: AnticipatoryRouting, monitor: Monitor | None = None
    ) -> None:
        self.t, self.routing, self.monitor = t, routing, monitor
        self.losses: list[float] = []
        self.modes: list[str] = []
        self.lags: list[int] = []
        self.batches: list[Tensor] = []
        self.used: list[list[Ids]] = []
        """Step → micro-batch → layer → the ids that the experts were given."""
        self.models: list[dict[str, Tensor]] = []
        self._now: Ids = {}
        for i, block in enumerate(t.model.blocks):
            block.moe.experts.register_forward_pre_hook(
                lambda _m, args, i=i: self._keep(i, args[1])
            )

    def _keep(self, layer: int, routing: Any) -> None:
        if torch.is_grad_enabled():
            self._now[layer] = routing.expert_ids_TK.clone()

    def run(
        self, data: Iterator[Tensor], steps: int, plan: Plan | None = None, start: int = 0
    ) -> "Seen":
        from geodiag.reference_models.data import Batch

        plan, t, step = plan or {}, self.t, start
        if step in plan:
            plan[step](self.routing)
        self.models.append({k: v.clone() for k, v in t.model.state_dict().items()})
        micros: list[Ids] = []
        for ids in self.routing.batches(data):
            if t.first:
                self.modes.append(self.routing.mode)
                self.lags.append(self.routing.lag)
            self.batches.append(ids)
            t.accumulate(Batch(0, ids[:, :-1], ids[:, 1:], ("x",) * len(ids)))
            micros.append(dict(self._now))
            if not t.ready:
                continue
            done = t.update()
            if self.monitor is not None:
                self.monitor.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
            self.losses.append(done.loss.item())
            self.used.append(micros)
            self.models.append({k: v.clone() for k, v in t.model.state_dict().items()})
            micros, step = [], step + 1
            if step in plan:
                plan[step](self.routing)
            if step == start + steps:
                return self
        return self


def on(routing: AnticipatoryRouting) -> None:
    routing.enable()


def off(routing: AnticipatoryRouting) -> None:
    routing.disable()


def watched(
    residual: str, delay: int, steps: int, plan: Plan, micro_batches: int = 1, **changes: Any
) -> Seen:
    t = trainer(residual, micro_batches, **changes)
    return Seen(t, routing_of(t, delay)).run(source(t), steps, plan)


# -- Δ = 0 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("jitter", [False, True])
def test_delay_zero_gives_bitwise_the_plain_losses(
    residual: str, micro_batches: int, jitter: bool
) -> None:
    plain = watched(residual, 0, 6, {}, micro_batches, jitter=jitter)
    routed = watched(residual, 0, 6, {0: on}, micro_batches, jitter=jitter)
    assert routed.modes == ["on"] * 6
    assert plain.modes == ["off"] * 6
    assert routed.losses == plain.losses
    assert all(
        torch.equal(a, b)
        for a, b in zip(routed.models[-1].values(), plain.models[-1].values(), strict=True)
    )


def test_a_delay_is_seen_in_the_losses() -> None:
    """The twin: the comparison above sees ids that are a few steps old."""
    assert watched("mhc", 3, 12, {0: on}).losses != watched("mhc", 3, 12, {}).losses


@pytest.mark.parametrize("around", ["the step", "the whole loop"])
def test_delay_zero_is_bitwise_under_autocast(around: str) -> None:
    """Captured in the precision that is trained in; and casts made without gradient never reach the
    training step.
    """

    def losses(delay: int | None) -> list[tuple[float, float]]:
        t = trainer()
        routing = routing_of(t, delay or 0)
        optimizer = torch.optim.SGD(t.model.parameters(), lr=1.0)
        out = []
        for step in range(6):
            if step == 1 and delay is not None:
                routing.enable()  # after one training forward, whose autocast is known
            with torch.autocast("cpu", torch.bfloat16, enabled=around == "the whole loop"):
                batches = routing.batches(iter([small.tokens(step)]))
                ids = next(batches)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = t.model.loss(t.model(ids[:, :-1]), ids[:, 1:]).total
            loss.backward()
            norm = sum(float(p.grad.norm()) for p in t.model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
            out.append((loss.item(), norm))
            batches.close()  # type: ignore[attr-defined]
        return out

    assert losses(0) == losses(None)


# -- Δ = d ---------------------------------------------------------------------------------


def routed_by(t: Trainer, weights: dict[str, Tensor], ids: Tensor) -> Ids:
    """What a saved copy of the model chooses for a batch."""
    copy = trainer(t.model.config.residual, recompute=t.model.config.recompute).model
    copy.load_state_dict(weights)
    with torch.no_grad():
        return {i: r.expert_ids_TK for i, r in enumerate(copy(ids[:, :-1]).routings)}


def learned(t: Trainer) -> list[int]:
    return [i for i, b in enumerate(t.model.blocks) if not isinstance(b.moe.router, HashRouter)]


def wrong(seen: Seen, delay: int, steps: range) -> int:
    """Micro-batches and learned layers whose ids are not those of `delay` steps ago."""
    m, bad = seen.t.config.micro_batches, 0
    for step in steps:
        for micro in range(m):
            then = routed_by(seen.t, seen.models[step - delay], seen.batches[step * m + micro])
            bad += sum(not torch.equal(then[i], seen.used[step][micro][i]) for i in learned(seen.t))
    return bad


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_ids_are_those_of_the_weights_delay_steps_ago(
    delay: int, micro_batches: int, recompute: str
) -> None:
    begin, end = 2, 9
    seen = watched(
        "mhc", delay, end + delay + 2, {begin: on, end: off}, micro_batches, recompute=recompute
    )
    replayed = range(begin + delay, end + delay)
    assert (
        seen.modes
        == ["off"] * 2 + ["warmup"] * delay + ["on"] * (7 - delay) + ["drain"] * delay + ["off"] * 2
    )
    assert seen.lags == [delay if step in replayed else 0 for step in range(len(seen.modes))]
    assert wrong(seen, delay, replayed) == 0
    live = [s for s in range(len(seen.modes)) if s not in replayed]
    assert sum(wrong(seen, 0, range(s, s + 1)) for s in live) == 0


@pytest.mark.parametrize("delay", [1, 3])
def test_the_weights_of_one_step_later_would_be_told_apart(delay: int) -> None:
    """The twin of the test above."""
    seen = watched("mhc", delay, 12, {0: on})
    assert wrong(seen, delay - 1, range(delay, 12)) > 0


def test_hash_layers_take_no_part() -> None:
    t = trainer()
    routing = routing_of(t, 2)
    assert [r.layer for r in routing.routers] == learned(t) == [1, 2]
    seen = Seen(t, routing).run(source(t), 6, {0: on})
    table = t.model.blocks[0].moe.router.table
    for ids, used in zip(seen.batches, seen.used, strict=True):
        assert torch.equal(used[0][0], table[ids[:, :-1].flatten()])


def test_a_model_without_learned_router_is_refused() -> None:
    with pytest.raises(ValueError, match="no learned router"):
        AnticipatoryRouting(trainer(hash_layers=3).model)


# -- gate weights and gradients --------------------------------------------------------------


def replayed_gradients(detached: bool) -> tuple[list[Any], list[Tensor]]:
    """Routings and router gradients of a step whose ids are two steps old."""
    t = trainer()
    routing = routing_of(t, 2)
    routing.enable()
    for step, ids in enumerate(routing.batches(source(t))):
        if detached and routing.replaying:
            for i in learned(t):
                t.model.blocks[i].moe.router.register_forward_hook(
                    lambda _m, _a, out: out._replace(weights_TK=out.weights_TK.detach())
                )
        output = t.model(ids[:, :-1])
        t.model.loss(output, ids[:, 1:]).total.backward()
        if step == 3:
            return list(output.routings), [
                t.model.blocks[i].moe.router.weight.grad for i in learned(t)
            ]
        for p in t.model.parameters():
            p.data -= 0.5 * p.grad
            p.grad = None
    raise AssertionError("the source has no end")


def test_gate_weights_are_todays_scores_at_the_old_ids() -> None:
    routings, _ = replayed_gradients(False)
    for r in routings[1:]:
        chosen = r.scores_TE.gather(1, r.expert_ids_TK)
        expected = chosen / chosen.sum(-1, keepdim=True) * 1.5
        torch.testing.assert_close(r.weights_TK, expected, rtol=1e-6, atol=0)
        assert not torch.equal(chosen, r.scores_TE.topk(2).values), (
            "some ids must not be today's choice"
        )


def test_gradients_reach_the_router_through_the_gate_weights() -> None:
    _, attached = replayed_gradients(False)
    _, detached = replayed_gradients(True)
    for a, d in zip(attached, detached, strict=True):
        assert a.norm() > 0
        assert (a - d).norm() > 0.1 * a.norm(), (
            "the balance loss alone must not explain the gradient"
        )


def test_recomputation_replays_the_same_ids() -> None:
    """Gradients under activation checkpointing are those without it."""
    plain, recomputed = (watched("mhc", 3, 10, {0: on}, recompute=r) for r in ("none", "layers"))
    np.testing.assert_allclose(recomputed.losses, plain.losses, rtol=1e-6)
    for name, value in plain.models[-1].items():
        torch.testing.assert_close(recomputed.models[-1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpoint_replay(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reentrant kind runs its first forward without gradient; it is the training step all the
    same.
    """
    from torch.utils._pytree import tree_flatten, tree_unflatten
    from torch.utils.checkpoint import checkpoint

    from geodiag.reference_models import transformer

    def either(layer: Any, *args: Any, use_reentrant: bool) -> Any:
        """Flat on the way out: the reentrant kind differentiates no tensor that lies inside another
        tuple.
        """
        spec = None

        def flat(*args: Any) -> tuple:
            nonlocal spec
            leaves, spec = tree_flatten(layer(*args))
            return tuple(leaves)

        leaves = checkpoint(flat, *args, use_reentrant=reentrant)
        return tree_unflatten(leaves, spec)

    monkeypatch.setattr(transformer, "checkpoint", either)
    t = trainer(recompute="layers")
    routing = routing_of(t, 2)
    seen: list[Tensor] = []
    t.model.blocks[2].moe.experts.register_forward_pre_hook(
        lambda _m, args: seen.append(args[1].expert_ids_TK)
    )
    routing.enable()
    for ids in islice(routing.batches(source(t)), 4):
        seen.clear()  # what the capture showed
        t.model.loss(t.model(ids[:, :-1]), ids[:, 1:]).total.backward()
        with torch.no_grad():
            for p in t.model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        assert len(seen) == 2
        assert torch.equal(*seen)


# -- batches and states ------------------------------------------------------------------------

PLANS: dict[str, tuple[Plan, int, list[str]]] = {
    "on and off and on again": (
        {1: on, 6: off, 10: on},
        14,
        [
            "off",
            *["warmup"] * 2,
            *["on"] * 3,
            *["drain"] * 2,
            *["off"] * 2,
            *["warmup"] * 2,
            *["on"] * 2,
        ],
    ),
    "disabled during warm-up": (
        {1: on, 2: off},
        6,
        ["off", "warmup", "drain", "drain", "off", "off"],
    ),
    "enabled again during drain": (
        {0: on, 5: off, 6: on},
        10,
        [*["warmup"] * 2, *["on"] * 3, "drain", "on", "warmup", "on", "on"],
    ),
    "changed its mind within a step": (
        {0: on, 3: lambda r: (off(r), on(r))[0]},
        5,
        [*["warmup"] * 2, *["on"] * 3],
    ),
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", PLANS)
def test_states_last_exactly_and_batches_keep_their_order(name: str, micro_batches: int) -> None:
    plan, steps, modes = PLANS[name]
    seen = watched("plain", 2, steps, plan, micro_batches)
    assert seen.modes == modes
    expected = [part for s in range(steps) for part in small.tokens(s).chunk(micro_batches)]
    assert len(seen.batches) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen.batches, expected, strict=True))
    replayed = [s for s in range(steps) if seen.lags[s]]
    assert sum(wrong(seen, 2, range(s, s + 1)) for s in replayed) == 0
    assert all(seen.modes[s] in ("on", "drain") for s in replayed)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("length", "tail"), [(8, 2), (3, 2), (2, 2), (1, 1), (0, 0)])
def test_the_queue_is_used_up_when_the_data_ends(
    length: int, tail: int, micro_batches: int
) -> None:
    t = trainer("plain", micro_batches)
    seen = Seen(t, routing_of(t, 2)).run(source(t, steps=length), 99, {0: on})
    expected = [part for s in range(length) for part in small.tokens(s).chunk(micro_batches)]
    assert len(seen.batches) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(seen.batches, expected, strict=True))
    assert len(seen.modes) == length
    assert all(m in ("drain", "off") for m in seen.modes[length - tail :])
    assert seen.routing.mode == "off"


def test_a_second_epoch_warms_up_again() -> None:
    t = trainer("plain")
    seen = Seen(t, routing_of(t, 2))
    for _ in range(2):
        seen.run(source(t, steps=6), 99, {0: on})
    one = [*["warmup"] * 2, *["on"] * 2, *["drain"] * 2]
    assert seen.modes == one * 2


def test_every_change_of_state_is_told_once() -> None:
    t = trainer("plain")
    routing, told = routing_of(t, 2), []
    routing.on_change = lambda old, new: told.append((old, new))
    Seen(t, routing).run(source(t), 9, {1: on, 5: off})
    assert told == [("off", "warmup"), ("warmup", "on"), ("on", "drain"), ("drain", "off")]


def test_the_delay_changes_only_while_routing_is_off() -> None:
    t = trainer("plain")
    routing = routing_of(t, 2)
    with pytest.raises(ValueError, match="0 to 64"):
        routing.enable(65)
    routing.enable(3)
    seen = Seen(t, routing).run(source(t), 4)
    assert seen.modes == ["warmup"] * 3 + ["on"]
    with pytest.raises(ValueError, match="until routing is off; it is in on now"):
        routing.enable(1)
    routing.enable(3)


# -- no trace --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["capture", "evaluation"])
def test_looking_leaves_no_trace_in_the_model_or_the_random_states(what: str) -> None:
    t = trainer(jitter=True)
    small.train(t, 2)
    ids = small.tokens(7)
    t.model.blocks[1].attn.eval()
    t.model.loss(t.model(ids[:, :-1]), ids[:, 1:]).total.backward()
    routing = routing_of(t, 4)

    def state() -> list[Any]:
        return [
            {k: v.clone() for k, v in t.model.state_dict().items()},
            [b.clone() for b in t.model.buffers()],
            [id(b) for b in t.model.buffers()],
            [p.grad.clone() for p in t.model.parameters() if p.grad is not None],
            [m.training for m in t.model.modules()],
            random.getstate(),
            torch.get_rng_state(),
            np.random.get_state(),  # noqa: NPY002
        ]

    before = state()
    if what == "capture":
        assert routing._capture(ids) is not None
    else:
        with isolated(t.model, evaluate=True):
            t.model(ids[:, :-1])
    for a, b in zip(_leaves(before), _leaves(state()), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else np.array_equal(a, b)
    moved = [x.clone() if isinstance(x, Tensor) else x for x in _leaves(before)]
    with torch.no_grad():
        t.model(ids[:, :-1])
    changed = [
        i
        for i, (a, b) in enumerate(zip(moved, _leaves(state()), strict=True))
        if not np.array_equal(a, b)
    ]
    assert changed, "a forward that does leave traces must be seen"


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple) and not isinstance(value, Tensor):
        return [x for v in value for x in _leaves(v)]
    return [value]


def test_an_exception_inside_leaves_no_trace_either() -> None:
    t = trainer(jitter=True)
    before, buffers = torch.get_rng_state(), [b.clone() for b in t.model.buffers()]
    t.model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), isolated(t.model, evaluate=True):
        t.model(small.tokens(0)[:, :-1])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(t.model.buffers(), buffers, strict=True))
    assert t.model.training
    assert torch.is_grad_enabled()


def test_rows_are_those_of_a_run_that_did_not_capture(tmp_path: Path) -> None:
    """Δ = 0 captures at every step; of its rows only the routing mode and the flips against the
    cache are its own.
    """

    def rows(name: str, plan: Plan) -> geodiag.Run:
        t = trainer("mhc", 2)
        routing = routing_of(t, 0)
        with small.watch(
            t, tmp_path / name, routing=routing, probe_every=2, micro_batches=2
        ) as monitor:
            Seen(t, routing, monitor).run(source(t), 5, plan)
        return geodiag.open_run(tmp_path / name)

    plain, ahead = rows("a", {}), rows("b", {0: on})
    layers, experts = ahead.read("layers"), ahead.read("experts")
    assert (
        layers[(layers.site == "ffn") & (layers.layer > 0)]["flip_rate_anticipatory"] == 0
    ).all()
    layers["flip_rate_anticipatory"] = np.float32("nan")
    layers_equal(plain.read("layers"), layers, 0)
    layers_equal(plain.read("experts"), experts, 0)
    assert ahead.read("steps")["tokens"].tolist() == plain.read("steps")["tokens"].tolist()
    assert ahead.read("steps")["routing_mode"].tolist() == ["on"] * 5


def test_recorded_flips_against_the_cache_are_those_of_the_ids(tmp_path: Path) -> None:
    t = trainer()
    routing = routing_of(t, 3)
    live: list[Tensor] = []

    def keep(router: nn.Module, _args: tuple, out: Any) -> None:
        if torch.is_grad_enabled():
            live.append((out.scores_TE.detach() + router.balance).topk(2).indices)

    t.model.blocks[2].moe.router.register_forward_hook(keep, prepend=True)  # before the replay
    with small.watch(t, tmp_path / "run", routing=routing) as monitor:
        seen = Seen(t, routing, monitor).run(source(t), 8, {0: on})
    rows = geodiag.open_run(tmp_path / "run").read("layers")
    got = rows[(rows.site == "ffn") & (rows.layer == 2)].set_index("step")["flip_rate_anticipatory"]
    from tests.hooks import slow

    assert got[:3].isna().all()
    for step in range(3, 8):
        expected = slow.flip_rate(live[step].tolist(), seen.used[step][0][2].tolist())
        assert got[step] == pytest.approx(expected)
    assert got.max() > 0
    steps = geodiag.open_run(tmp_path / "run").read("steps")
    assert steps["routing_lag"].tolist() == [0] * 3 + [3] * 5
    assert steps["routing_mode"].tolist() == ["warmup"] * 3 + ["on"] * 5


@pytest.mark.parametrize("how", ["without gradient", "in eval mode", "of another shape"])
def test_an_evaluation_between_steps_is_not_replayed(how: str) -> None:
    t = trainer()
    routing = routing_of(t, 1)
    routing.enable()
    ids = small.tokens(99)[:, :-1]
    if how == "of another shape":
        ids = ids[:2, :5]
    for step, batch in enumerate(routing.batches(source(t))):
        small.one_step(t, batch)
        t.model.train(how != "in eval mode")
        with torch.set_grad_enabled(how == "in eval mode"):
            got = [r.expert_ids_TK for r in t.model(ids).routings]
        t.model.train()
        if step == 3:
            break
    routing.remove()
    with torch.no_grad():
        expected = [r.expert_ids_TK for r in t.model(ids).routings]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_loop_that_is_left_routes_nothing_by_its_last_ids() -> None:
    t = trainer()
    routing = routing_of(t, 1)
    routing.enable()
    for step, batch in enumerate(routing.batches(source(t))):
        small.one_step(t, batch)
        if step == 3:
            break
    assert not routing.replaying
    ids = small.tokens(50)[:2, :-1]
    loss = t.model.loss(t.model(ids), ids).total
    assert torch.isfinite(loss)


def test_removed_hooks_leave_the_model_as_it_was() -> None:
    t = trainer()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in t.model.modules())

    before = hooks()
    routing = routing_of(t, 1)
    assert hooks() > before
    routing.remove()
    assert hooks() == before


# -- what can go wrong -------------------------------------------------------------------------


def test_a_failed_capture_goes_back_to_todays_choice_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain = watched("mhc", 2, 8, {})
    t = trainer()

    def forward(model: nn.Module, ids: Tensor) -> Any:
        if t.steps_done:
            raise RuntimeError("out of memory")
        return model(ids[:, :-1])

    routing = AnticipatoryRouting(t.model, 2, forward=forward)
    with small.watch(t, tmp_path / "run", routing=routing, policy="on") as monitor:
        seen = Seen(t, routing, monitor).run(source(t), 8)
    assert seen.losses == plain.losses
    assert seen.modes == ["warmup", "drain", "drain", "off", "off", "off", "off", "off"]
    assert seen.lags == [0] * 8
    events = geodiag.open_run(tmp_path / "run").read("events")
    problems = events[events.kind == "problem"]["message"].tolist()
    assert problems == [
        "anticipatory routing went back to today's choice: RuntimeError: out of memory"
    ]
    assert "out of memory" in capsys.readouterr().err


def test_a_failed_capture_is_raised_to_who_uses_routing_alone() -> None:
    t = trainer()
    routing = AnticipatoryRouting(t.model, 2, forward=lambda *_: 1 / 0)
    routing.enable()
    with pytest.raises(ZeroDivisionError):
        next(routing.batches(source(t)))


def test_a_batch_that_was_changed_after_its_capture_is_refused_with_the_fix() -> None:
    """Ids of other tokens would be taken without complaint where the batch has fewer."""
    t = trainer()
    routing = routing_of(t, 0)
    routing.enable()
    batches = routing.batches(source(t))
    batch = next(batches)
    with pytest.raises(
        ValueError, match="chosen for 48 tokens and the batch has 24; train on each batch as"
    ):
        t.model(batch[:2, :-1])


def test_the_last_forward_of_a_router_is_what_counts_as_its_choice() -> None:
    t = trainer()
    routing = routing_of(t, 0)
    choices = RouterChoices(routing.routers)
    with torch.no_grad(), choices.recording() as seen:
        t.model(small.tokens(0)[:, :-1])
        last = t.model(small.tokens(1)[:, :-1])
    assert [c.expert_ids_TK.tolist() for c in seen] == [
        r.expert_ids_TK.tolist() for r in last.routings[1:]
    ]
    assert isinstance(t.model.blocks[1].moe.router, Router)


# -- resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("save_at", [2, 5, 9, 10, 13])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, save_at: int, micro_batches: int
) -> None:
    """Saved in warm-up (2), on (5), drain (9, 10) and off again (13)."""
    delay, steps, plan = 3, 15, {1: on, 8: off}
    whole = watched("mhc", delay, steps, plan, micro_batches, jitter=True)
    assert [whole.modes[s - 1] for s in (2, 5, 9, 10, 13)] == [
        "warmup",
        "on",
        "drain",
        "drain",
        "off",
    ]

    t = trainer("mhc", micro_batches, jitter=True)
    routing, fetched = routing_of(t, delay), [0]

    def counted(start: int) -> Iterator[Tensor]:
        for part in islice(source(t), start, None):
            fetched[0] += 1
            yield part

    with small.watch(t, tmp_path / "run", routing=routing, micro_batches=micro_batches) as monitor:
        first = Seen(t, routing, monitor).run(counted(0), save_at, plan)
        saved = io.BytesIO()
        state = {
            "trainer": t.state_dict(),
            "routing": routing.state_dict(),
            "monitor": monitor.state_dict(),
            "fetched": fetched[0],
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),  # noqa: NPY002
        }
        torch.save(state, saved)

    saved.seek(0)
    state = torch.load(saved, weights_only=False)
    t = trainer("mhc", micro_batches, jitter=True, seed=1)
    t.load_state_dict(state["trainer"])
    routing = routing_of(t, 7)
    with small.watch(t, tmp_path / "run", routing=routing, micro_batches=micro_batches) as monitor:
        monitor.load_state_dict(state["monitor"])
        routing.load_state_dict(state["routing"])
        random.setstate(state["random"][0])
        np.random.set_state(state["random"][1])  # noqa: NPY002
        torch.set_rng_state(state["random"][2])
        later = {k: v for k, v in plan.items() if k > save_at}
        second = Seen(t, routing, monitor).run(
            counted(state["fetched"]), steps - save_at, later, start=save_at
        )
    assert first.losses + second.losses == whole.losses
    assert first.modes + second.modes == whole.modes
    assert all(
        torch.equal(a, b)
        for a, b in zip(second.models[-1].values(), whole.models[-1].values(), strict=True)
    )
    assert geodiag.open_run(tmp_path / "run").read("steps")["routing_mode"].tolist() == whole.modes


def test_queued_batches_do_not_fit_another_number_of_micro_batches() -> None:
    t = trainer("mhc", 2)
    seen = Seen(t, routing_of(t, 2)).run(source(t), 3, {0: on})
    with pytest.raises(ValueError, match="2 a step, not 1"):
        routing_of(trainer(), 2).load_state_dict(seen.routing.state_dict())
