"""transformers' DeepSeek-V4 under the same attach: values by definition, whatever way its experts
are run.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import geodiag
from geodiag.errors import GeodiagError
from geodiag.hooks.adapters import find_layout
from geodiag.hooks.faults import KINDS, Fault, Faults
from geodiag.hooks.monitor import Monitor
from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from tests.hooks import slow
from tests.hooks.adapters import tiny_v4
from tests.hooks.faults.test_faults import changed
from tests.hooks.test_monitor import keep_gradient_norm, layers_equal

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def train(
    path: Path | None, steps: int = 3, routing_on: int | None = None, **options: Any
) -> tuple[list[float], nn.Module]:
    """Losses, and the trained model; recorded in `path` unless None."""
    model = tiny_v4.model(**options)
    opt = tiny_v4.optimizer(model)
    routing = None if routing_on is None else AnticipatoryRouting(model, routing_on)
    monitor: Monitor | None = None
    if path is not None:
        policy = "off" if routing is None else "on"
        monitor = geodiag.attach(
            model, opt, path, probe_every=2, quiet=True, routing=routing, policy=policy
        )
    batches = (tiny_v4.batch(s) for s in range(steps))
    losses = [
        tiny_v4.one_step(model, opt, b, monitor)
        for b in (routing.batches(batches) if routing else batches)
    ]
    if monitor is not None:
        monitor.close()
    return losses, model


class Seen:
    """What the modules of one step computed, for the slow definitions."""

    def __init__(self, model: Any) -> None:
        self.comb: list[Tensor] = []
        self.post: list[Tensor] = []
        self.streams: list[Tensor] = []
        self.branches: list[Tensor] = []
        self.gates: dict[int, tuple] = {}
        self.hidden: dict[int, Tensor] = {}
        self.grads: list[float] = []
        own = model.model
        for i, layer in enumerate(own.layers):
            for connection, branch in ((layer.attn_hc, layer.self_attn), (layer.ffn_hc, layer.mlp)):
                connection.register_forward_hook(self._mix)
                branch.register_forward_hook(
                    lambda _m, _a, out: self.branches.append(first(out).detach().double())
                )
            layer.mlp.gate.register_forward_hook(
                lambda _m, _a, out, i=i: self.gates.__setitem__(i, out)
            )
            layer.mlp.register_forward_pre_hook(
                lambda _m, args, i=i: self.hidden.__setitem__(i, args[0].detach().flatten(0, 1))
            )
        own.hc_head.register_forward_pre_hook(lambda _m, args: self._stream(args[0]))

    def _stream(self, x: Tensor) -> None:
        self.streams.append(x.detach().flatten(0, 1).double())
        keep_gradient_norm(x, self.grads)

    def _mix(self, _: Any, args: tuple, out: tuple) -> None:
        self._stream(args[0])
        self.post.append(out[0].detach().flatten(0, 1).double())
        self.comb.append(out[1].detach().flatten(0, 1).double())


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Seen, pd.DataFrame, pd.DataFrame, Any]:
    """One step seen by hooks of our own, its rows, and the model with the weights of that step."""
    path = tmp_path_factory.mktemp("v4") / "run"
    model = tiny_v4.model()
    opt = tiny_v4.optimizer(model)
    with geodiag.attach(model, opt, path, probe_every=2, quiet=True) as monitor:
        tiny_v4.one_step(model, opt, tiny_v4.batch(0), monitor)
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        seen = Seen(model)
        tiny_v4.one_step(model, opt, tiny_v4.batch(1), monitor)
    model.load_state_dict(weights)
    run = geodiag.open_run(path)
    assert run.manifest["found"] | {"missing": []} == {
        "family": "deepseek_v4 (transformers)",
        "layers": 3,
        "sites": 6,
        "routers": 3,
        "hash_layers": [0],
        "experts": 6,
        "experts_per_token": 2,
        "streams": 4,
        "constrained": True,
        "missing": [],
    }
    return seen, run.read("layers", steps=(1, 2)), run.read("experts", steps=(1, 2)), model


def expected_gains(seen: Seen, transposed: bool) -> list[dict[str, float]]:
    """The catalogue's values of each site, from `comb`: the applied operator is its transpose."""
    applied = torch.stack(seen.comb).numpy() if transposed else torch.stack(seen.comb).mT.numpy()
    forward, backward = slow.composites_fwd(applied), slow.composites_bwd(applied)
    out = []
    for s, h in enumerate(applied):
        x, after = seen.streams[s].numpy(), seen.streams[s + 1].numpy()
        branch = seen.branches[s].flatten(0, 1).numpy()
        growth = slow.transport(x, after)
        out.append(
            {
                "amax_gain_fwd": slow.mean_amax_fwd(h),
                "amax_gain_bwd": slow.mean_amax_bwd(h),
                "gain_fwd_min": slow.mean_gain_fwd_min(h),
                "composite_gain_fwd": slow.mean_amax_fwd(forward[s]),
                "composite_gain_bwd": slow.mean_amax_bwd(backward[s]),
                "composite_gain_fwd_min": slow.mean_gain_fwd_min(forward[s]),
                "spectral_norm_res": float(np.linalg.norm(h, 2, axis=(1, 2)).mean()),
                "branch_share": slow.branch_share(h, x, seen.post[s].numpy(), branch),
                "stream_amax": float(np.abs(after).max()),
                "stream_rms": float(np.sqrt(np.mean(after**2))),
                "transport_gain_fwd": growth[0],
                "transport_gain_fwd_max": growth[1],
            }
        )
    return out


def test_gains_are_those_of_the_operator_that_is_applied(recorded: tuple) -> None:
    seen, rows, *_ = recorded
    assert rows["site"].tolist() == ["attn", "ffn"] * 3
    for row, expected in zip(rows.to_dict("records"), expected_gains(seen, False), strict=True):
        for name, value in expected.items():
            # The spectral norm is iterated from below, and these maps' singular values are close
            # together.
            assert row[name] == pytest.approx(value, rel=1e-3 if "spectral" in name else 1e-5), name
    for s, row in enumerate(rows.to_dict("records")):
        assert row["sinkhorn_residual"] == pytest.approx(
            slow.sinkhorn_residual(seen.comb[s].numpy()), abs=2e-6
        )


def test_the_applied_operator_makes_the_streams_what_they_are(recorded: tuple) -> None:
    """combᵀ X + post F is the next stream; comb X + post F is not: the maps are not symmetric."""
    seen, *_ = recorded
    far = []
    for s, comb in enumerate(seen.comb):
        written = seen.post[s].unsqueeze(-1) * seen.branches[s].flatten(0, 1).unsqueeze(-2)
        right, wrong = comb.mT @ seen.streams[s] + written, comb @ seen.streams[s] + written
        torch.testing.assert_close(right, seen.streams[s + 1], rtol=1e-5, atol=1e-6)
        far.append(((wrong - seen.streams[s + 1]).norm() / seen.streams[s + 1].norm()).item())
    assert min(far[1:]) > 1e-3, (
        "at the first site all streams are still alike; from there on it shows"
    )


def test_the_transposed_orientation_would_be_seen(recorded: tuple) -> None:
    """The twin: forward and backward swapped are far outside the tolerance above."""
    seen, rows, *_ = recorded
    far = {
        name: max(
            abs(row[name] / expected[name] - 1)
            for row, expected in zip(
                rows.to_dict("records"), expected_gains(seen, True), strict=True
            )
        )
        for name in (
            "amax_gain_fwd",
            "amax_gain_bwd",
            "composite_gain_fwd",
            "composite_gain_bwd",
            "branch_share",
        )
    }
    assert min(far.values()) > 1e-4, far


def test_gradient_growth_is_the_ratio_of_the_streams_gradients(recorded: tuple) -> None:
    seen, rows, *_ = recorded
    expected = [a / b for a, b in pairwise(seen.grads[::-1])]
    np.testing.assert_allclose(rows["transport_gain_bwd"], expected, rtol=1e-4)


def pre_activations(model: Any, seen: Seen, layer: int) -> tuple[dict[int, Tensor], Tensor]:
    """Expert → gate and up of its tokens; and the shared expert's, from weights and inputs."""
    mlp, x = model.model.layers[layer].mlp, seen.hidden[layer].double()
    ids = seen.gates[layer][2]
    routed = {
        e: x[(ids == e).any(-1)] @ mlp.experts.gate_up_proj[e].detach().double().T
        for e in range(tiny_v4.EXPERTS)
    }
    shared = [
        x @ w.weight.detach().double().T
        for w in (mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj)
    ]
    return routed, torch.cat(shared, -1)


def test_clamp_rates_are_exact_and_count_the_shared_expert(recorded: tuple) -> None:
    seen, rows, _, model = recorded
    rows = rows[rows.site == "ffn"].set_index("layer")
    for layer in range(3):
        routed, shared = pre_activations(model, seen, layer)
        both = torch.cat([*routed.values(), shared])
        gate, up = both.chunk(2, -1)
        rates = slow.clamp_rates(gate.numpy(), up.numpy(), tiny_v4.LIMIT)
        names = ("clamp_gate_rate", "clamp_up_high_rate", "clamp_up_low_rate")
        assert [rows.loc[layer, n] for n in names] == pytest.approx(rates, rel=1e-6)
        assert min(rates) > 0, "the limit must bite, on all three sides"
        assert rows.loc[layer, "gate_amax"] == pytest.approx(gate.abs().max().item(), rel=1e-5)
        assert rows.loc[layer, "up_amax"] == pytest.approx(up.abs().max().item(), rel=1e-5)
        gate, up = torch.cat(list(routed.values())).chunk(2, -1)
        alone = slow.clamp_rates(gate.numpy(), up.numpy(), tiny_v4.LIMIT)
        assert alone != pytest.approx(rates, rel=1e-4), (
            "without the shared expert the rates must differ"
        )


def test_expert_rows_follow_their_definitions(recorded: tuple) -> None:
    seen, rows, experts, model = recorded
    rows, experts = (
        rows[rows.site == "ffn"].set_index("layer"),
        experts.set_index(["layer", "expert"]),
    )
    limit = tiny_v4.LIMIT
    for layer in range(3):
        routed, _ = pre_activations(model, seen, layer)
        _, weights, ids = (t.detach() for t in seen.gates[layer])
        rms = {}
        for e, gate_up in routed.items():
            gate, up = gate_up.chunk(2, -1)
            act = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
            row = experts.loc[(layer, e)]
            assert row["load"] == pytest.approx((ids == e).double().mean().item(), abs=1e-6)
            assert row["gate_mass"] == pytest.approx(
                (weights[ids == e].sum() / weights.sum()).item(), abs=1e-6
            )
            if not len(gate):
                assert np.isnan(row["act_rms"])
                continue
            rms[e] = act.square().mean().sqrt().item()
            hits = (gate > limit).sum() + (up > limit).sum() + (up < -limit).sum()
            assert row["act_rms"] == pytest.approx(rms[e], rel=1e-4)
            assert row["act_amax"] == pytest.approx(act.abs().max().item(), rel=1e-4)
            assert row["clamp_hits"] == hits.item()
        median = np.median(list(rms.values()))
        assert rows.loc[layer, "expert_norm_max_median"] == pytest.approx(
            max(rms.values()) / median, rel=1e-4
        )


def test_router_metrics_follow_their_definitions(recorded: tuple) -> None:
    seen, rows, *_ = recorded
    rows = rows[rows.site == "ffn"].set_index("layer")
    for layer in (1, 2):
        logits, _, ids = seen.gates[layer]
        scores = torch.nn.functional.softplus(logits.detach().double()).sqrt()
        load = torch.bincount(ids.flatten(), minlength=tiny_v4.EXPERTS).double()
        assert rows.loc[layer, "router_margin_mean"] == pytest.approx(
            slow.margins(scores.numpy(), tiny_v4.K).mean(), rel=1e-3
        )
        assert rows.loc[layer, "router_entropy"] == pytest.approx(
            slow.entropy(scores.numpy()), rel=1e-5
        )
        assert rows.loc[layer, "max_vio"] == pytest.approx(slow.max_vio(load.numpy()), rel=1e-5)
    assert pd.isna(rows.loc[0, "router_margin_mean"])
    assert pd.isna(rows.loc[0, "bias_abs_max"])


def test_flips_are_recorded_and_hash_layers_have_none(tmp_path: Path) -> None:
    model = tiny_v4.model()
    opt, chosen = tiny_v4.optimizer(model), []
    probe = tiny_v4.tokens(999)
    with geodiag.attach(
        model, opt, tmp_path / "run", probe={"input_ids": probe}, probe_every=2, quiet=True
    ) as monitor:
        for step in range(5):
            tiny_v4.one_step(model, opt, tiny_v4.batch(step), monitor)
            if step % 2 == 0:
                with torch.no_grad():
                    chosen.append(choices(model, {"input_ids": probe}))
    rows = geodiag.open_run(tmp_path / "run").read("layers")
    rows = rows[rows.site == "ffn"].set_index(["step", "layer"])
    for step, (then, now) in ((2, chosen[:2]), (4, chosen[1:])):
        for layer in range(3):
            expected = slow.flip_rate(now[layer].tolist(), then[layer].tolist())
            assert rows.loc[(step, layer), "flip_rate"] == pytest.approx(expected)
        assert rows.loc[(step, 0), "flip_rate"] == 0
        assert rows.loc[(4, 0), "flip_rate_router"] == 0
    assert rows["flip_rate"].max() > 0
    assert rows.loc[(4, 2), "flip_rate_router"] > 0


def choices(model: Any, inputs: dict[str, Tensor]) -> dict[int, Tensor]:
    """The experts that a forward chooses, by layer."""
    found: dict[int, Tensor] = {}
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out, i=i: found.__setitem__(i, out[2]))
        for i, layer in enumerate(model.model.layers)
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


# -- nothing changes, whatever way the model runs ------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_are_bitwise_those_without_geodiag(
    tmp_path: Path, implementation: str, checkpointing: bool
) -> None:
    options = {"implementation": implementation, "checkpointing": checkpointing}
    assert train(tmp_path / "run", **options)[0] == train(None, **options)[0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_are_the_same_whatever_way_the_experts_run(
    tmp_path: Path, implementation: str, checkpointing: bool
) -> None:
    train(tmp_path / "plain")
    train(tmp_path / "other", implementation=implementation, checkpointing=checkpointing)
    a, b = geodiag.open_run(tmp_path / "plain"), geodiag.open_run(tmp_path / "other")
    assert a.read("events")["kind"].tolist() == b.read("events")["kind"].tolist() == ["attempt"]
    # Other orders of summation move the weights a little, and the clamp's hits with them: the first
    # step is exact.
    for table in ("layers", "experts"):
        layers_equal(a.read(table, steps=(0, 1)), b.read(table, steps=(0, 1)), 1e-4)
        assert a.read(table).shape == b.read(table).shape


def test_experts_of_the_wrong_rows_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: were batched rows taken for rows in order of expert, the comparison above would
    fail.
    """
    train(tmp_path / "plain")
    monkeypatch.setattr("geodiag.hooks.adapters.deepseek_v4_experts.IN_TOKEN_ORDER", ())
    train(tmp_path / "other", implementation="batched_mm")
    tables = [
        geodiag.open_run(tmp_path / n).read("experts", steps=(0, 1)) for n in ("plain", "other")
    ]
    with pytest.raises(AssertionError):
        layers_equal(*tables, 1e-4)


def test_hooks_and_the_instance_attribute_come_off(tmp_path: Path) -> None:
    model = tiny_v4.model()

    def traces() -> list[int]:
        return [
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            sum("_apply_gate" in m.__dict__ for m in model.modules()),
        ]

    before = traces()
    with geodiag.attach(model, None, tmp_path / "run", quiet=True):
        assert traces()[0] > before[0]
        assert traces()[1] == 3
    assert traces() == before == [before[0], 0]


def test_an_implementation_that_hides_its_activations_is_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def hidden(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return x * weights.sum(-1, keepdim=True)

    ALL_EXPERTS_FUNCTIONS.register("hidden", hidden)
    train(tmp_path / "run", steps=2, implementation="hidden")
    events = geodiag.open_run(tmp_path / "run").read("events")
    problems = events[events.kind == "problem"]["message"].tolist()
    assert len(problems) == 3
    assert (
        "'hidden' does not show its activations; eager, grouped_mm and batched_mm do" in problems[0]
    )
    rows = geodiag.open_run(tmp_path / "run").read("layers")
    assert rows["composite_gain_fwd"].notna().all()


# -- anticipatory routing ------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_delay_zero_gives_bitwise_the_plain_losses(tmp_path: Path, checkpointing: bool) -> None:
    plain, _ = train(None, 4, checkpointing=checkpointing)
    assert train(tmp_path / "run", 4, routing_on=0, checkpointing=checkpointing)[0] == plain
    assert (
        geodiag.open_run(tmp_path / "run").read("steps")["routing_mode"].tolist()[:3] == ["on"] * 3
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ids_are_those_of_the_weights_delay_steps_ago(checkpointing: bool) -> None:
    model, copy = tiny_v4.model(checkpointing=checkpointing), tiny_v4.model()
    opt, routing, past = tiny_v4.optimizer(model), AnticipatoryRouting(model, 2), []
    used: dict[int, list[Tensor]] = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda _m, args, i=i: used.setdefault(i, []).append(args[1])
        )
    routing.enable()
    differing = 0
    for step, inputs in enumerate(routing.batches(tiny_v4.batch(s) for s in range(9))):
        past.append({k: v.clone() for k, v in model.state_dict().items()})
        used.clear()
        tiny_v4.one_step(model, opt, inputs)
        assert all(torch.equal(ids[0], again) for ids in used.values() for again in ids), (
            "the recomputation too"
        )
        lag = 2 if step >= 2 else 0
        for age in (lag, lag - 1) if lag else (0,):
            copy.load_state_dict(past[step - age])
            with torch.no_grad():
                then = choices(copy, inputs)
            same = [torch.equal(then[i], used[i][0]) for i in range(3)]
            if age == lag:
                assert same == [True] * 3
            differing += age != lag and not all(same)
    assert differing > 3, "the twin: weights of one step later choose otherwise"


# -- faults --------------------------------------------------------------------------------------

WEIGHTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "expert-scale": ("model.layers.1.mlp.experts.gate_up_proj", lambda w: w[4]),
    "bit-flip": ("model.layers.1.mlp.experts.gate_up_proj", lambda w: w[4, :24]),
    "gate-column": ("model.layers.1.mlp.gate.weight", lambda w: w[4]),
    "router-shift": ("model.layers.1.mlp.gate.weight", lambda w: w),
    "router-permute": ("model.layers.1.mlp.gate.weight", lambda w: w),
    "bias-kick": ("model.layers.1.mlp.gate.e_score_correction_bias", lambda w: w[4]),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_fault_of_a_weight_changes_that_weight_only(kind: str) -> None:
    model, (name, part) = tiny_v4.model(), WEIGHTS[kind]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Faults([Fault.parse(f"{kind}@4:1")], find_layout(model)).before_step(4)
    where = changed(before, {k: v.clone() for k, v in model.state_dict().items()})
    assert list(where) == [name]
    assert where[name].sum() == part(where[name]).sum() > 0
    if kind == "expert-scale":
        assert torch.equal(model.state_dict()[name][4], 30 * before[name][4])


def test_faults_that_last_are_felt_and_taken_back() -> None:
    model, untouched = tiny_v4.model(), tiny_v4.model()
    layer, plain = model.model.layers[1], untouched.model.layers[1]
    streams, x = torch.randn(1, 2, 4, 32), torch.randn(1, 3, 32)
    for kind in ("residual-expand", "block-scale"):
        faults = Faults([Fault.parse(f"{kind}@1:1=2")], find_layout(model))
        for step, factor in ((0, 1), (1, 2), (10, 2), (11, 1)):
            faults.before_step(step)
            of_comb, of_block = (factor, 1) if kind == "residual-expand" else (1, factor)
            for site in ("attn_hc", "ffn_hc"):
                post, comb, collapsed = getattr(plain, site)(streams)
                now = getattr(layer, site)(streams)
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(now, (post, of_comb * comb, collapsed), strict=True)
                )
            assert torch.equal(layer.mlp(x), of_block * plain.mlp(x))
    inputs = tiny_v4.batch(0)
    assert torch.equal(model(**inputs).logits, untouched(**inputs).logits)


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if v.place in ("router", "bias")])
def test_a_hash_routed_layer_takes_no_router_fault(kind: str) -> None:
    with pytest.raises(GeodiagError, match="in layer 0; layers that can take it: 1, 2"):
        Faults([Fault.parse(f"{kind}@1:0")], find_layout(tiny_v4.model()))
