"""Under torch.compile: one graph, the same rows as eager, the same routing; or a refusal with the
reason.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import geodiag
from geodiag.errors import GeodiagError
from geodiag.hooks.adapters.module_hooks import register_first_hook
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from tests.hooks import small
from tests.hooks.test_monitor import layers_equal

WAYS = ("the whole model", "in place", "layer by layer")
# The model's grouped matmul cannot be traced in float32, and wants rows of 16 bytes.
TRACEABLE = {"dtype": "bfloat16", "expert_dim": 16, "layers": 2}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(model: Any, way: str, backend: str) -> Any:
    if way == "the whole model":
        return torch.compile(model, backend=backend, fullgraph=True)
    for part in [model] if way == "in place" else model.layers:
        part.compile(backend=backend, fullgraph=True)
    return model


def recorded(
    path: Path,
    way: str | None,
    steps: int = 4,
    delay: int | None = None,
    micro_batches: int = 1,
    backend: str = "eager",
) -> tuple[list[float], geodiag.Run]:
    """Losses and rows of a training that was attached first and compiled afterwards."""
    t = small.trainer(micro_batches=micro_batches, **TRACEABLE)
    routing = None
    if delay is not None:
        routing = AnticipatoryRouting(t.model, delay, forward=lambda m, ids: m(ids[:, :-1]))
    policy = "off" if routing is None else "on"
    probe = (small.tokens(999)[:, :-1],)
    counters.clear()
    with small.watch(
        t,
        path,
        probe=probe,
        probe_every=1,
        routing=routing,
        policy=policy,
        micro_batches=micro_batches,
    ) as monitor:
        if way is not None:
            t.forward = compiled(t.model, way, backend)
        data = (small.tokens(s) for s in range(steps))
        losses = [
            small.one_step(t, ids, monitor) for ids in (routing.batches(data) if routing else data)
        ]
    assert bool(counters["stats"]["unique_graphs"]) == (way is not None), "compiled, or not"
    return losses, geodiag.open_run(path)


def same(eager: geodiag.Run, other: geodiag.Run) -> None:
    for table in ("layers", "experts"):
        layers_equal(eager.read(table), other.read(table), 1e-6)
    assert other.read("events")["kind"].tolist() == eager.read("events")["kind"].tolist()
    assert len(other.read("matrices")) == len(eager.read("matrices")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_training_records_and_routes_as_the_eager_one(tmp_path: Path, way: str) -> None:
    losses, run = recorded(tmp_path / "a", None, delay=1)
    with torch._dynamo.config.patch(
        recompile_limit=64
    ):  # layers that share their code share its cache of graphs
        compiled_losses, compiled_run = recorded(tmp_path / "b", way, delay=1)
    assert run.read("steps")["routing_mode"].tolist() == ["warmup", "on", "on", "drain"]
    assert compiled_losses == losses
    assert losses != recorded(tmp_path / "c", None)[0], "the ids must matter"
    same(run, compiled_run)
    rows = compiled_run.read("layers")
    assert rows["composite_gain_fwd"].notna().all()
    assert rows["transport_gain_bwd"].notna().all()
    late = rows[(rows.site == "ffn") & (rows.layer == 1) & (rows.step >= 2)]
    for name in (
        "flip_rate",
        "flip_rate_router",
        "flip_rate_anticipatory",
        "clamp_gate_rate",
        "router_margin_p10",
    ):
        assert late[name].notna().all(), name


@pytest.mark.slow
def test_past_the_limit_of_recompilation_layers_run_eager_and_are_recorded_all_the_same(
    tmp_path: Path,
) -> None:
    """Every layer writes to places of its own, so each needs its own graph; `fullgraph` would be an
    error here.
    """
    run = recorded(tmp_path / "a", None)[1]
    with torch._dynamo.config.patch(recompile_limit=1), pytest.MonkeyPatch.context() as patch:
        whole = torch.nn.Module.compile
        patch.setattr(
            torch.nn.Module, "compile", lambda m, backend, fullgraph: whole(m, backend=backend)
        )
        other = recorded(tmp_path / "b", "layer by layer")[1]
    same(run, other)


@pytest.mark.slow
def test_gradients_are_recorded_where_the_backward_is_traced_too(tmp_path: Path) -> None:
    """As the default backend does it, which then generates code."""
    eager, other = (
        recorded(tmp_path / (w or "a"), w, 2, backend="aot_eager") for w in (None, "in place")
    )
    assert other[0] == eager[0]
    same(eager[1], other[1])
    assert other[1].read("layers")["transport_gain_bwd"].notna().all()


@pytest.mark.slow
def test_micro_batches_of_a_compiled_training_are_all_recorded(tmp_path: Path) -> None:
    eager, other = (
        recorded(tmp_path / (w or "eager"), w, 2, micro_batches=2)[1] for w in (None, "in place")
    )
    same(eager, other)
    assert other.read("steps")["tokens"].tolist() == [48.0, 48.0]


@pytest.mark.parametrize("way", WAYS)
def test_attaching_to_what_is_compiled_is_refused_with_the_fix(tmp_path: Path, way: str) -> None:
    model = compiled(small.trainer().model, way, "eager")
    for attempt in (
        lambda: geodiag.attach(model, None, tmp_path / "run"),
        lambda: AnticipatoryRouting(model),
    ):
        with pytest.raises(GeodiagError, match=r"attach geodiag first, then call torch\.compile"):
            attempt()
    assert not (tmp_path / "run").exists()


def test_a_hook_that_comes_after_the_first_call_is_indeed_not_seen() -> None:
    """Why that is refused."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    faster = torch.compile(model, backend="eager")
    faster(torch.ones(1, 4))
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    faster(torch.ones(1, 4))
    assert seen == []


def test_who_comes_first_in_line_is_called_first_and_counted_first() -> None:
    """torch.compile before 2.13 counts; torch's own `prepend` changes only the calling."""

    def orders(prepend: bool) -> tuple[list[str], list[str]]:
        module, called = torch.nn.Identity(), []
        for name in "ab":
            module.register_forward_hook(lambda *_, name=name: called.append(name))
        if prepend:
            module.register_forward_hook(lambda *_: called.append("c"), prepend=True)
        else:
            register_first_hook(module, lambda *_: called.append("c"))
        module(torch.ones(1))
        by_count = [module._forward_hooks[key] for key in dict.keys(module._forward_hooks)]
        seen = called.copy()
        called.clear()
        for hook in by_count:
            hook(module, (), None)
        return seen, called

    assert orders(prepend=False) == (["c", "a", "b"], ["c", "a", "b"])
    assert orders(prepend=True) == (["c", "a", "b"], ["a", "b", "c"])
