"""router-lag: the routers' weights of Δ steps ago choose for today's hidden states; today's scores
weigh.
"""

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geodiag
from geodiag.errors import GeodiagError
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from geodiag.hooks.routing.factory import create_routing
from geodiag.hooks.routing.router_lag import RouterLag
from geodiag.reference_models.train import Trainer
from tests.hooks import small
from tests.hooks.routing.test_anticipatory import Plan, Seen, off, on, source, trainer


def lag_of(t: Trainer, delay: int, **options: Any) -> RouterLag:
    return RouterLag(t.model, delay, micro_batches=t.config.micro_batches, **options)


def watched(delay: int, steps: int, plan: Plan, micro_batches: int = 1, **changes: Any) -> Seen:
    t = trainer("mhc", micro_batches, **changes)
    return Seen(t, lag_of(t, delay)).run(source(t), steps, plan)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("jitter", [False, True])
def test_delay_zero_gives_bitwise_the_plain_losses(micro_batches: int, jitter: bool) -> None:
    plain = watched(0, 6, {}, micro_batches, jitter=jitter)
    lagged = watched(0, 6, {0: on}, micro_batches, jitter=jitter)
    assert lagged.modes == ["on"] * 6
    assert lagged.losses == plain.losses
    assert all(
        torch.equal(a, b)
        for a, b in zip(lagged.models[-1].values(), plain.models[-1].values(), strict=True)
    )
    assert watched(3, 6, {0: on}, micro_batches, jitter=jitter).losses != plain.losses, (
        "the twin: a delay is seen"
    )


def test_off_is_bitwise_the_training_without_it() -> None:
    t = trainer("mhc", jitter=True)
    assert small.train(t, 6) == watched(4, 6, {}, jitter=True).losses


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_choice_is_that_of_the_old_router_on_todays_hidden_states(micro_batches: int) -> None:
    """Against weights that a test wrote down itself; with the weights of any other step it must
    fail.
    """
    delay, t = 3, trainer("mhc", micro_batches)
    hidden: list[dict[int, Tensor]] = []
    for i, block in enumerate(t.model.blocks):
        block.moe.router.register_forward_pre_hook(
            lambda _m, args, i=i: (
                hidden.append({}) if i == 0 else hidden[-1].__setitem__(i, args[0].detach().clone())
            )
        )
    seen = Seen(t, lag_of(t, delay)).run(source(t), 9, {0: on})
    assert seen.modes == ["warmup"] * delay + ["on"] * (9 - delay)
    assert seen.lags == [0] * delay + [delay] * (9 - delay)
    wrong = {0: 0, 1: 0}
    for step in range(delay, 9):
        for micro in range(micro_batches):
            for layer in (1, 2):
                for shift in wrong:
                    then = seen.models[step - delay + shift]
                    router = f"layers.{layer}.moe.router"
                    logits = (
                        hidden[step * micro_batches + micro][layer] @ then[f"{router}.weight"].T
                    )
                    scores = nn.functional.softplus(logits).sqrt() + then[f"{router}.balance"]
                    ids = scores.topk(2).indices
                    wrong[shift] += int((ids != seen.used[step][micro][layer]).sum())
    assert wrong[0] == 0
    assert wrong[1] > 0


def test_gate_weights_are_todays_and_their_gradient_reaches_the_router() -> None:
    t = trainer("mhc")
    routing = lag_of(t, 2)
    routing.enable()
    for step, ids in enumerate(routing.batches(source(t))):
        if step == 4:
            out = t.model(ids[:, :-1])
            r, router = out.routings[2], t.model.blocks[2].moe.router
            live = (r.scores_TE.detach() + router.balance).topk(2).indices
            assert not torch.equal(live.sort().values, r.expert_ids_TK.sort().values)
            chosen = r.scores_TE.gather(-1, r.expert_ids_TK)
            assert torch.equal(r.weights_TK, chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * 1.5)
            r.weights_TK.backward(torch.randn_like(r.weights_TK))
            assert router.weight.grad is not None
            assert router.weight.grad.abs().sum() > 0
            break
        small.one_step(t, ids)


PLANS: dict[str, tuple[Plan, int, list[str]]] = {
    "on from the start": ({0: on}, 5, [*["warmup"] * 2, *["on"] * 3]),
    "switched on late it begins at once": (
        {4: on, 6: off},
        8,
        [*["off"] * 4, *["on"] * 2, *["off"] * 2],
    ),
    "disabled during warm-up": ({0: on, 1: off}, 3, ["warmup", "off", "off"]),
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", PLANS)
def test_states_last_exactly_and_batches_come_as_they_are(name: str, micro_batches: int) -> None:
    plan, steps, modes = PLANS[name]
    seen = watched(2, steps, plan, micro_batches)
    assert seen.modes == modes
    expected = [part for s in range(steps) for part in small.tokens(s).chunk(micro_batches)]
    assert all(torch.equal(a, b) for a, b in zip(seen.batches, expected, strict=True))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_second_epoch_goes_on_with_the_same_past(micro_batches: int) -> None:
    """What ends an epoch is no step: the weights of Δ steps ago stay those."""
    whole = watched(3, 10, {0: on}, micro_batches)
    t = trainer("mhc", micro_batches)
    seen = Seen(t, lag_of(t, 3)).run(source(t, steps=6), 99, {0: on})
    assert seen.routing.mode == "off", "no epoch, no step"
    seen.run(source(t, 6, 4), 99)
    assert seen.losses == whole.losses


def test_old_weights_may_wait_on_the_device_or_in_host_memory() -> None:
    t = trainer("mhc")
    seen = Seen(t, lag_of(t, 3, device_bytes=0)).run(source(t), 8, {0: on})
    assert seen.losses == watched(3, 8, {0: on}).losses


@pytest.mark.parametrize("how", ["without gradient", "in eval mode"])
def test_an_evaluation_between_steps_is_not_rerouted(how: str) -> None:
    t = trainer()
    routing = lag_of(t, 2)
    routing.enable()
    ids = small.tokens(99)[:, :-1]
    for step, batch in enumerate(routing.batches(source(t))):
        small.one_step(t, batch)
        t.model.train(how != "in eval mode")
        with torch.set_grad_enabled(how == "in eval mode"):
            got = [r.expert_ids_TK for r in t.model(ids).routings]
        t.model.train()
        if step == 4:
            assert routing.mode == "on"
            break
    routing.remove()
    with torch.no_grad():
        expected = [r.expert_ids_TK for r in t.model(ids).routings]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_recomputation_chooses_the_same_experts() -> None:
    assert watched(3, 8, {0: on}, recompute="layers").losses == watched(3, 8, {0: on}).losses


@pytest.mark.slow
def test_weights_that_are_sharded_are_put_together_again() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    def losses(delay: int, sharded: bool) -> list[float]:
        t = trainer("plain")
        if sharded:
            for part in (*t.model.layers, t.model):
                fully_shard(part)
        optimizer = torch.optim.AdamW(t.model.parameters(), lr=0.03)
        routing, out = lag_of(t, delay), []
        routing.enable()
        for ids in routing.batches(source(t, steps=6)):
            loss = t.model.loss(t.model(ids[:, :-1]), ids[:, 1:]).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return out

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert losses(2, sharded=True) == losses(2, sharded=False)
        assert losses(2, sharded=True) != losses(0, sharded=True), "the twin: a delay is seen"
    finally:
        dist.destroy_process_group()


def test_after_a_rewind_it_warms_up_again() -> None:
    t = trainer()
    routing = lag_of(t, 2)
    seen = Seen(t, routing).run(source(t), 4, {0: on})
    routing.rewind()
    assert routing.mode == "off"
    seen.run(source(t, 2), 4)
    assert seen.modes == [*["warmup"] * 2, *["on"] * 2] * 2


def test_its_rows_never_speak_of_anticipatory_routing(tmp_path: Path) -> None:
    t = trainer("mhc")
    routing = lag_of(t, 2)
    with small.watch(t, tmp_path / "run", routing=routing, policy="on", probe_every=2) as monitor:
        Seen(t, routing, monitor).run(source(t), 6)
    run = geodiag.open_run(tmp_path / "run")
    assert run.read("steps")["routing_mode"].tolist() == [*["warmup"] * 2, *["on"] * 4]
    assert run.read("steps")["routing_lag"].tolist() == [0, 0, 2, 2, 2, 2]
    assert run.read("layers")["flip_rate_anticipatory"].isna().all()


@pytest.mark.parametrize("save_at", [2, 4, 6, 9])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(save_at: int) -> None:
    """Saved in warm-up (2), on (4), off with a past (6), on again (9)."""
    delay, steps, plan = 3, 11, {0: on, 5: off, 7: on}
    whole = watched(delay, steps, plan, jitter=True)
    assert [whole.modes[s - 1] for s in (2, 4, 6, 9)] == ["warmup", "on", "off", "on"]
    t = trainer("mhc", jitter=True)
    routing = lag_of(t, delay)
    first = Seen(t, routing).run(source(t), save_at, plan)
    saved = io.BytesIO()
    import random

    import numpy as np

    randoms = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002
    torch.save(
        {"trainer": t.state_dict(), "routing": routing.state_dict(), "random": randoms}, saved
    )
    saved.seek(0)
    state = torch.load(saved, weights_only=False)
    t = trainer("mhc", jitter=True, seed=1)
    t.load_state_dict(state["trainer"])
    routing = lag_of(t, 7)
    routing.load_state_dict(state["routing"])
    random.setstate(state["random"][0])
    np.random.set_state(state["random"][1])  # noqa: NPY002
    torch.set_rng_state(state["random"][2])
    later = {k: v for k, v in plan.items() if k > save_at}
    data: Iterator[Tensor] = islice(source(t), save_at, None)
    second = Seen(t, routing).run(data, steps - save_at, later, start=save_at)
    assert first.losses + second.losses == whole.losses
    assert first.modes + second.modes == whole.modes


def test_a_failure_goes_back_to_todays_choice_and_training_goes_on() -> None:
    plain = watched(1, 6, {})
    t = trainer("mhc")
    routing, told = lag_of(t, 1), []
    routing.on_failure = told.append
    keep_today = routing._keep_today
    routing._keep_today = lambda: keep_today() if t.steps_done < 2 else 1 / 0  # type: ignore[assignment,func-returns-value]
    seen = Seen(t, routing).run(source(t), 6, {1: on, 2: on})
    assert [type(e) for e in told] == [ZeroDivisionError], "said once"
    assert seen.modes == ["off", "on", "off", "off", "off", "off"]
    assert seen.losses[:1] == plain.losses[:1]


def test_a_variant_is_made_by_its_name() -> None:
    model = small.trainer().model
    assert isinstance(
        create_routing("anticipatory", model, 4, forward=lambda m, b: m(b)), AnticipatoryRouting
    )
    assert isinstance(create_routing("router-lag", model, 4, forward=lambda m, b: m(b)), RouterLag)
    with pytest.raises(
        GeodiagError, match="no routing variant 'lag'; one of anticipatory, router-lag"
    ):
        create_routing("lag", model, 4)
