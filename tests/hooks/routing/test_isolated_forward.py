"""The capture runs what routers need and nothing behind it; its ids wait where there is room."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geodiag
from geodiag.hooks.distributed import sharded_weights
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from geodiag.hooks.routing.isolated_forward import RouterChoices, isolated
from geodiag.hooks.routing.tensor_stash import TensorStash
from geodiag.reference_models.train import Trainer
from tests.hooks import small
from tests.hooks.routing.test_anticipatory import Seen, on, routing_of, source, trainer, watched


def calls(model: nn.Module) -> list[str]:
    """Names of the modules that run from now on, in order."""
    seen: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _m, _a, name=name: seen.append(name))
    return seen


def whole_forward(t: Trainer, ids: Tensor) -> list[Tensor]:
    choices = RouterChoices(routing_of(t, 0).routers)
    with isolated(t.model, evaluate=False), choices.recording() as seen:
        t.model(ids[:, :-1])
    return [c.expert_ids_TK for c in seen]


# -- what is run ------------------------------------------------------------------------------


def test_the_last_experts_the_head_and_the_loss_are_not_run() -> None:
    t = trainer()
    routing, ids = routing_of(t, 0), small.tokens(3)
    expected = whole_forward(t, ids)
    ran = calls(t.model)
    captured = routing._capture(ids)
    assert ran[-1] == "layers.2.moe.router"
    assert "layers.1.moe.experts" in ran
    assert not {"layers.2.moe.experts", "layers.2.moe.shared", "read_out", "head"} & set(ran)
    assert captured is not None
    assert captured.flat.dtype == torch.int16
    assert all(torch.equal(a.long(), b) for a, b in zip(captured.take(), expected, strict=True))


def test_a_forward_that_catches_every_exception_is_left_all_the_same() -> None:
    t = trainer()
    ran = calls(t.model)

    def forward(model: nn.Module, ids: Tensor) -> Any:
        try:
            return model(ids[:, :-1])
        except Exception:
            return model.head(torch.zeros(1, 16))

    assert AnticipatoryRouting(t.model, 0, forward=forward)._capture(small.tokens(0)) is not None
    assert "head" not in ran


def test_outside_a_capture_nothing_is_left_out() -> None:
    t = trainer()
    routing = routing_of(t, 0)
    routing._capture(small.tokens(0))
    ran = calls(t.model)
    with torch.no_grad():
        t.model(small.tokens(0)[:, :-1])
    assert ran[-1] == "head"


def test_a_router_that_chose_nothing_is_a_failed_capture() -> None:
    t = trainer()
    routing = AnticipatoryRouting(t.model, 1, forward=lambda m, ids: m.embed(ids))
    routing.enable()
    with pytest.raises(ValueError, match="2 of 2 routers chose nothing in this forward"):
        list(routing.batches(source(t, steps=3)))


def test_of_sharded_weights_only_a_forward_that_breaks_off_ends_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharded_weights, "is_sharded", lambda _: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    failures: list[Exception] = []

    def capture(forward: Any) -> Any:
        routing = AnticipatoryRouting(trainer().model, 1, forward=forward)
        routing.on_failure = failures.append
        return routing._capture(small.tokens(0))

    assert capture(lambda model, ids: model.embed(ids)) is None
    assert "routers chose nothing" in str(failures)
    with pytest.raises(geodiag.GeodiagError, match="ZeroDivisionError"):
        capture(lambda model, ids: 1 / 0)


@pytest.fixture
def alone_in_a_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fully_shard"])
def test_delay_zero_is_bitwise_inside_a_wrapper(alone_in_a_group: None, wrapper: str) -> None:
    """DDP's forward may be left halfway. What `fully_shard` has begun it must end, or gradients are
    not reduced.
    """

    def losses(delay: int | None, tokens: list[int] | None = None) -> list[float]:
        from torch.distributed.fsdp import fully_shard

        t = trainer("plain")
        inner = t.model
        if wrapper == "fully_shard":
            for layer in inner.layers:
                fully_shard(layer)
            fully_shard(inner)
        model = nn.parallel.DistributedDataParallel(inner) if wrapper == "ddp" else inner
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        routing = AnticipatoryRouting(model, delay or 0, forward=lambda m, ids: m(ids[:, :-1]))
        if delay is not None:
            routing.enable()
        if tokens is not None:
            inner.head.register_forward_pre_hook(lambda _m, args: tokens.append(args[0].shape[1]))
        out = []
        for ids in routing.batches(source(t, steps=5)):
            loss = inner.loss(model(ids[:, :-1]), ids[:, 1:]).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return out

    tokens: list[int] = []
    plain = losses(None)
    assert plain[0] != plain[-1]
    assert losses(0, tokens) == plain
    assert tokens == ([1, small.SEQUENCE] if wrapper == "fully_shard" else [small.SEQUENCE]) * 5
    assert losses(2) != plain, "the twin: a delay is seen"


@pytest.mark.slow
def test_behind_layers_that_are_compiled_one_by_one_nothing_is_run(tmp_path: Path) -> None:
    torch._dynamo.reset()
    t = small.trainer(dtype="bfloat16", expert_dim=16, layers=2)
    routing = routing_of(t, 0)
    ran = calls(t.model.head)
    with torch._dynamo.config.patch(recompile_limit=64):
        for layer in t.model.layers:
            layer.compile(backend="eager", fullgraph=True)
        assert routing._capture(small.tokens(0)) is not None
    assert ran == []


@pytest.mark.slow
def test_of_a_model_compiled_as_a_whole_the_head_sees_one_token_a_sequence() -> None:
    torch._dynamo.reset()
    t = small.trainer(dtype="bfloat16", expert_dim=16, layers=2)
    tokens: list[int] = []
    t.model.head.register_forward_pre_hook(lambda _m, args: tokens.append(args[0].shape[1]))
    expected = whole_forward(t, small.tokens(0))
    routing = AnticipatoryRouting(t.model, 0, forward=lambda _m, ids: compiled(ids[:, :-1]))
    compiled = torch.compile(t.model, backend="eager", fullgraph=True)
    captured = routing._capture(small.tokens(0))
    assert captured is not None
    assert all(torch.equal(a.long(), b) for a, b in zip(captured.take(), expected, strict=True))
    with torch.no_grad():
        compiled(small.tokens(0)[:, :-1])
    assert tokens == [small.SEQUENCE, 1, small.SEQUENCE]


# -- where training is not in float32, not in one piece, not kept ------------------------------


def mixed(
    delay: int | None, recompute: str, dtype: torch.dtype, micro_batches: int = 2
) -> list[float]:
    """Autocast, a gradient scaler, accumulation and perhaps activation checkpointing at once."""
    t = trainer("mhc", micro_batches, recompute=recompute)
    routing = routing_of(t, delay or 0)
    optimizer = torch.optim.SGD(t.model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    out = []
    for n, ids in enumerate(routing.batches(source(t, steps=5)), 1):
        if delay is not None:
            # At the second step: the first forward has set the precision of the training.
            routing.enable()
        with torch.autocast("cpu", dtype):
            loss = t.model.loss(t.model(ids[:, :-1]), ids[:, 1:]).total
        scaler.scale(loss).backward()
        out.append(loss.item())
        if n % micro_batches == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_delay_zero_is_bitwise_in_mixed_precision_with_everything_at_once(
    dtype: torch.dtype, recompute: str
) -> None:
    plain = mixed(None, recompute, dtype)
    assert mixed(0, recompute, dtype) == plain
    assert mixed(2, recompute, dtype) != plain, "the twin: a delay is seen"


def test_the_longest_delay_replays_what_was_chosen_so_long_ago() -> None:
    delay = 64
    seen = watched("plain", delay, delay + 2, {0: on}, layers=2)
    assert seen.modes == ["warmup"] * delay + ["on"] * 2
    t = trainer("plain", layers=2)
    for step in (0, 1):
        t.model.load_state_dict(seen.models[step])
        expected = whole_forward(t, small.tokens(step + delay))
        assert torch.equal(expected[0], seen.used[step + delay][0][1])
    t.model.load_state_dict(seen.models[2])
    assert not torch.equal(whole_forward(t, small.tokens(delay + 1))[0], seen.used[delay + 1][0][1])


def test_after_a_rewind_the_queue_is_empty_and_the_same_batches_come_again() -> None:
    t = trainer("plain")
    routing = routing_of(t, 3)
    seen = Seen(t, routing).run(source(t), 5, {0: on})
    assert (routing.mode, routing.queued) == ("on", 3)
    routing.rewind()
    assert (routing.mode, routing.queued) == ("off", 0)
    seen.run(source(t, 2), 4)
    assert seen.modes[5:] == ["warmup"] * 3 + ["on"]
    assert all(
        torch.equal(a, small.tokens(s)) for s, a in zip([2, 3, 4, 5], seen.batches[5:], strict=True)
    )


# -- tensor stash -----------------------------------------------------------------------


def test_what_is_put_aside_comes_back_as_it_was() -> None:
    tensors = [
        torch.randint(100, (5, 2)).short(),
        torch.randint(100, (7,)).short(),
        torch.zeros(0, 3).short(),
    ]
    for room in (0, 1 << 20):
        kept = TensorStash.put(tensors, room)
        for got in (kept.take(), kept.on_host()):
            assert all(
                torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, tensors, strict=True)
            )
    tensors[0] += 1
    assert not torch.equal(kept.take()[0], tensors[0]), "a copy, not the tensor itself"


def test_a_smaller_type_becomes_the_widest_without_loss() -> None:
    half, full = torch.randn(9).bfloat16(), torch.randn(4, 2)
    got = TensorStash.put([half, full], 0).take()
    assert torch.equal(got[0].bfloat16(), half)
    assert torch.equal(got[1], full)
