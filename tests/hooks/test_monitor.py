"""A monitor of a real training: values follow their definitions; results stay bit-identical."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import geodiag
from geodiag.errors import GeodiagError
from geodiag.hooks.measure import streams
from geodiag.reference_models.mhc import HyperConnection
from geodiag.reference_models.moe import HashRouter
from tests.hooks import slow, small

IDENTITY = ("rank", "attempt", "step", "layer", "site", "step_seconds", "record_seconds")


def recorded(
    tmp_path: Path, name: str, steps: int = 3, micro_batches: int = 1, **changes: Any
) -> geodiag.Run:
    t = small.trainer(micro_batches=micro_batches, **changes)
    with small.watch(
        t, tmp_path / name, probe_every=2, probe=(small.tokens(999)[:, :-1],)
    ) as monitor:
        small.train(t, steps, monitor)
    return geodiag.open_run(tmp_path / name)


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_losses_are_bitwise_those_without_geodiag(
    tmp_path: Path, residual: str, micro_batches: int
) -> None:
    bare = small.train(small.trainer(residual, micro_batches), 8)
    t = small.trainer(residual, micro_batches)
    with small.watch(t, tmp_path / "run", probe_every=2) as monitor:
        watched = small.train(t, 8, monitor)
    assert watched == bare
    moved = small.trainer(residual, micro_batches)
    next(moved.model.parameters()).data[0, 0] += 1e-3
    assert small.train(moved, 8) != bare, "the comparison must see a change in one weight"


def layers_equal(a: pd.DataFrame, b: pd.DataFrame, tolerance: float) -> None:
    assert list(a.columns) == list(b.columns)
    for name in a.columns:
        if name in IDENTITY:
            continue
        pd.testing.assert_series_equal(a[name].isna(), b[name].isna(), check_names=False)
        # A second difference has few digits left.
        rtol = max(tolerance, 5e-3) if name.startswith("curvature") else tolerance
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("recompute", ["layers", "mhc"])
def test_recomputation_records_the_same_values(tmp_path: Path, recompute: str) -> None:
    plain, recomputed = recorded(tmp_path, "a"), recorded(tmp_path, "b", recompute=recompute)
    for table in ("layers", "experts"):
        layers_equal(plain.read(table), recomputed.read(table), 1e-5)


def test_what_a_checkpoint_recomputes_is_not_measured_again(tmp_path: Path) -> None:
    """Hooks fire in the backward too; what they showed in the forward is on record already."""
    t, seen = small.trainer(recompute="layers"), []
    with (
        small.watch(t, tmp_path / "run", probe_every=1 << 30) as monitor,
        pytest.MonkeyPatch.context() as patch,
    ):
        whole = streams.seen_at_place
        patch.setattr(streams, "seen_at_place", lambda *a: seen.append(1) or whole(*a))
        small.train(t, 1, monitor)
        fired = []
        t.model.blocks[0].attn_hc.register_forward_hook(lambda *_: fired.append(1))
        small.train(t, 1, monitor, start=1)
    assert len(seen) == 2 * 7, "six sites and the last stream, in each of two steps"
    assert len(fired) == 2, "or the checkpoint computes nothing again, and this says nothing"


def test_gradient_accumulation_records_the_same_values(tmp_path: Path) -> None:
    whole, halves = (
        recorded(tmp_path, "a", steps=1),
        recorded(tmp_path, "b", steps=1, micro_batches=2),
    )
    layers_equal(whole.read("layers"), halves.read("layers"), 1e-4)
    layers_equal(whole.read("experts"), halves.read("experts"), 1e-4)
    assert (
        whole.read("steps")["tokens"].tolist() == halves.read("steps")["tokens"].tolist() == [48.0]
    )


def test_more_micro_batches_than_passed_to_attach_are_all_recorded(tmp_path: Path) -> None:
    """Buffers grow by themselves: the values of four micro-batches are those of the whole batch."""
    whole, quarters = (
        recorded(tmp_path, "a", steps=1),
        recorded(tmp_path, "b", steps=1, micro_batches=4),
    )
    layers_equal(whole.read("layers"), quarters.read("layers"), 1e-4)


class Seen:
    """Keeps what the modules computed, for the slow definitions."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.res: list[Tensor] = []
        self.post: list[Tensor] = []
        self.streams: list[Tensor] = []
        self.branches: list[Tensor] = []
        for block in model.blocks:  # type: ignore[union-attr]
            for connection, branch in ((block.attn_hc, block.attn), (block.ffn_hc, block.moe)):
                connection.register_forward_hook(self._mix)
                branch.register_forward_hook(self._branch)
        model.read_out.register_forward_pre_hook(
            lambda _m, args: self.streams.append(flat(args[0], 2))
        )  # type: ignore[union-attr]

    def _mix(self, _: Any, args: tuple, mix: Any) -> None:
        self.streams.append(flat(args[0], 2))
        self.res.append(flat(mix.res_TNN, 2))
        self.post.append(flat(mix.post_TN, 1))

    def _branch(self, _: Any, __: Any, out: Any) -> None:
        self.branches.append(flat(out if isinstance(out, Tensor) else out.hidden_BSC, 1))


def flat(x: Tensor, keep: int) -> Tensor:
    return x.detach().flatten(0, -1 - keep).double()


@pytest.mark.parametrize("residual", ["hc", "mhc"])
def test_layer_metrics_follow_their_definitions(tmp_path: Path, residual: str) -> None:
    t = small.trainer(residual)
    with small.watch(t, tmp_path / "run") as monitor:
        small.train(t, 4, monitor)
        seen = Seen(t.model)
        small.train(t, 1, monitor, start=4)
    rows = geodiag.open_run(tmp_path / "run").read("layers", steps=(4, 5))
    res = torch.stack(seen.res).numpy()
    assert rows["layer"].tolist() == [0, 0, 1, 1, 2, 2]
    assert rows["site"].tolist() == ["attn", "ffn"] * 3
    forward, backward = slow.composites_fwd(res), slow.composites_bwd(res)
    for s, row in enumerate(rows.to_dict("records")):
        x, after = seen.streams[s].numpy(), seen.streams[s + 1].numpy()
        growth = slow.transport(x, after)
        expected = {
            "amax_gain_fwd": slow.mean_amax_fwd(res[s]),
            "amax_gain_bwd": slow.mean_amax_bwd(res[s]),
            "gain_fwd_min": slow.mean_gain_fwd_min(res[s]),
            "composite_gain_fwd": slow.mean_amax_fwd(forward[s]),
            "composite_gain_bwd": slow.mean_amax_bwd(backward[s]),
            "composite_gain_fwd_min": slow.mean_gain_fwd_min(forward[s]),
            "amax_gain_fwd_of_mean": slow.mean_amax_fwd(res[s].mean(0, keepdims=True)),
            "spectral_norm_res": float(np.linalg.norm(res[s], 2, axis=(1, 2)).mean()),
            "spectral_norm_res_max": float(np.linalg.norm(res[s], 2, axis=(1, 2)).max()),
            "branch_share": slow.branch_share(
                res[s], x, seen.post[s].numpy(), seen.branches[s].numpy()
            ),
            "stream_amax": float(np.abs(after).max()),
            "stream_rms": float(np.sqrt(np.mean(after**2))),
            "transport_gain_fwd": growth[0],
            "transport_gain_fwd_max": growth[1],
            "post_concentration": float(
                np.mean(seen.post[s].numpy().max(1) / seen.post[s].numpy().mean(1))
            ),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4), (name, s)
        assert row["sinkhorn_residual"] == pytest.approx(slow.sinkhorn_residual(res[s]), abs=2e-6)


def keep_gradient_norm(streams: Tensor, norms: list[float]) -> None:
    streams.register_hook(lambda grad: norms.append(grad.double().norm().item()))


def test_gradient_growth_is_the_ratio_of_the_streams_gradients(tmp_path: Path) -> None:
    t, norms = small.trainer(), []
    with small.watch(t, tmp_path / "run") as monitor:
        small.train(t, 1, monitor)
        for m in t.model.modules():
            if isinstance(m, HyperConnection):
                m.register_forward_hook(lambda _m, args, _o: keep_gradient_norm(args[0], norms))
        t.model.read_out.register_forward_pre_hook(
            lambda _m, args: keep_gradient_norm(args[0], norms)
        )
        small.train(t, 1, monitor, start=1)
    rows = geodiag.open_run(tmp_path / "run").read("layers", steps=(1, 2))
    ordered = norms[::-1]  # gradients arrive from the end
    expected = [a / b for a, b in pairwise(ordered)]
    np.testing.assert_allclose(rows["transport_gain_bwd"], expected, rtol=1e-4)


def test_layer_gradient_norms_are_those_before_clipping(tmp_path: Path) -> None:
    t = small.trainer()
    seen: list[float] = []
    original = torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, limit: float) -> Tensor:
        layer = t.model.blocks[1]
        seen.append(
            math.sqrt(sum(p.grad.double().square().sum().item() for p in layer.parameters()))
        )
        return original(parameters, 0.01)

    with small.watch(t, tmp_path / "run") as monitor, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        small.train(t, 2, monitor)
    rows = geodiag.open_run(tmp_path / "run").read("layers")
    got = rows[(rows.layer == 1) & (rows.site == "ffn")]["grad_norm"]
    np.testing.assert_allclose(got, seen, rtol=1e-3)


def test_hash_routed_layers_never_flip_and_have_no_margin(tmp_path: Path) -> None:
    run = recorded(tmp_path, "run", steps=6)
    rows = run.read("layers")
    hashed = rows[(rows.layer == 0) & (rows.site == "ffn")]
    learned = rows[(rows.layer > 0) & (rows.site == "ffn")]
    for name in ("flip_rate", "flip_any", "flip_top1", "flip_rate_router"):
        assert (hashed[name].dropna() == 0).all()
        assert hashed[name].notna().any()
    assert hashed["router_margin_mean"].isna().all()
    assert learned["router_margin_mean"].notna().all()
    assert learned["flip_rate"].max() > 0, (
        "the learned ones must flip at this learning rate, or 0 says nothing"
    )


def test_flips_of_the_routers_own_update_use_the_weights_of_lag_steps_ago(tmp_path: Path) -> None:
    t, lag = small.trainer(), 3
    past: list[dict[int, tuple[Tensor, Tensor]]] = []
    hidden: dict[int, Tensor] = {}
    learned = {
        i: b.moe.router
        for i, b in enumerate(t.model.blocks)
        if not isinstance(b.moe.router, HashRouter)
    }
    for i, router in learned.items():
        router.register_forward_hook(
            lambda _m, args, _o, i=i: hidden.__setitem__(i, args[0].detach())
        )
    with small.watch(t, tmp_path / "run", probe_every=lag) as monitor:
        for step in range(6):
            past.append(
                {i: (r.weight.detach().clone(), r.balance.clone()) for i, r in learned.items()}
            )
            small.train(t, 1, monitor, start=step)
    rows = geodiag.open_run(tmp_path / "run").read("layers")
    rows = rows[rows.site == "ffn"]
    assert rows[rows.step < lag]["flip_rate_router"].isna().all()
    from geodiag.reference_models.kernels.reference import affinity, choose

    for i in learned:
        now, then = (
            choose(affinity(hidden[i], past[s][i][0]), past[s][i][1], 2) for s in (5, 5 - lag)
        )
        got = rows[(rows.step == 5) & (rows.layer == i)]["flip_rate_router"].item()
        assert got == pytest.approx(slow.flip_rate(now.tolist(), then.tolist()))


def test_probe_flips_compare_the_same_tokens_at_two_times(tmp_path: Path) -> None:
    t = small.trainer()
    probe, chosen = small.tokens(999)[:, :-1], []
    with small.watch(t, tmp_path / "run", probe=(probe,), probe_every=2) as monitor:
        for step in range(5):
            small.train(t, 1, monitor, start=step)
            if step % 2 == 0:
                with torch.no_grad():
                    chosen.append([r.expert_ids_TK.tolist() for r in t.model(probe).routings])
    rows = geodiag.open_run(tmp_path / "run").read("layers")
    rows = rows[rows.site == "ffn"].set_index(["step", "layer"])
    for layer in range(3):
        for step, (then, now) in ((2, chosen[:2]), (4, chosen[1:])):
            assert rows.loc[(step, layer), "flip_rate"] == pytest.approx(
                slow.flip_rate(now[layer], then[layer])
            )
            assert rows.loc[(step, layer), "flip_any"] == pytest.approx(
                slow.flip_any(now[layer], then[layer])
            )
    assert rows["flip_rate"].xs(3, level="step").isna().all()


def test_weight_spectra_approach_the_singular_values(tmp_path: Path) -> None:
    t = small.trainer()
    t.config = t.config.__class__(**(t.config.__dict__ | {"lr": 0.0, "weight_decay": 0.0}))
    for optimizer in t.optimizers:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
    with small.watch(t, tmp_path / "run", probe_every=1) as monitor:
        small.train(t, 30, monitor)
    rows = geodiag.open_run(tmp_path / "run").read("layers", steps=(29, 30))
    row = rows[(rows.layer == 1) & (rows.site == "ffn")].iloc[0]
    moe = t.model.blocks[1].moe
    top = torch.linalg.matrix_norm(moe.experts.down.detach().double(), 2).max().item()
    assert row["spectral_norm_down"] == pytest.approx(top, rel=1e-2)
    assert row["spectral_norm_router"] == pytest.approx(
        torch.linalg.matrix_norm(moe.router.weight, 2).item(), rel=1e-2
    )


def test_loads_and_expert_norms_follow_their_definitions(tmp_path: Path) -> None:
    t = small.trainer(swiglu_limit=0.05)
    acts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    shared: dict[int, Tensor] = {}
    with small.watch(t, tmp_path / "run") as monitor:
        small.train(t, 2, monitor)
        for i, b in enumerate(t.model.blocks):
            b.moe.experts.act.register_forward_hook(
                lambda _m, args, out, i=i: acts.__setitem__(
                    i, (args[0].detach(), args[1], out.out_AF.detach())
                )
            )
            b.moe.shared.act.register_forward_hook(
                lambda _m, args, _o, i=i: shared.__setitem__(i, args[0].detach())
            )
        small.train(t, 1, monitor, start=2)
    run = geodiag.open_run(tmp_path / "run")
    layers, experts = run.read("layers", steps=(2, 3)), run.read("experts", steps=(2, 3))
    for i, (gate_up, expert, act) in acts.items():
        row = layers[(layers.layer == i) & (layers.site == "ffn")].iloc[0]
        everything = torch.cat([gate_up.flatten(), shared[i].flatten()])
        halves = [torch.cat([a.flatten(), b.flatten()]).double().numpy() for a, b in
                  zip(gate_up.chunk(2, -1), shared[i].chunk(2, -1), strict=True)]  # fmt: skip
        rates = slow.clamp_rates(halves[0], halves[1], 0.05)
        assert row["clamp_gate_rate"] == pytest.approx(rates[0], rel=1e-5)
        assert row["clamp_up_high_rate"] == pytest.approx(rates[1], rel=1e-5)
        assert row["clamp_up_low_rate"] == pytest.approx(rates[2], rel=1e-5)
        assert 0 < rates[0] < 1
        assert len(everything)
        rms = slow.expert_rms(act.double().numpy(), expert.tolist(), 4)
        known = [r for r in rms if r is not None]
        assert row["expert_norm_max_median"] == pytest.approx(
            max(known) / np.median(known), rel=1e-4
        )
        mine = experts[experts.layer == i].set_index("expert")
        for e, value in enumerate(rms):
            assert mine.loc[e, "load"] == pytest.approx((expert == e).float().mean().item())
            assert (
                math.isnan(mine.loc[e, "act_rms"])
                if value is None
                else mine.loc[e, "act_rms"] == pytest.approx(value)
            )


def test_evaluation_between_steps_leaves_no_trace(tmp_path: Path) -> None:
    plain = recorded(tmp_path, "a").read("layers")
    t = small.trainer()
    with small.watch(
        t, tmp_path / "b", probe_every=2, probe=(small.tokens(999)[:, :-1],)
    ) as monitor:
        for step in range(3):
            with torch.no_grad():
                t.model(small.tokens(500 + step)[:, :-1])
            small.train(t, 1, monitor, start=step)
    layers_equal(plain, geodiag.open_run(tmp_path / "b").read("layers"), 1e-6)


def test_sampling_every_few_steps_records_those_steps_only(tmp_path: Path) -> None:
    t = small.trainer()
    with small.watch(t, tmp_path / "run", every=3) as monitor:
        small.train(t, 7, monitor)
    run = geodiag.open_run(tmp_path / "run")
    assert run.read("layers")["step"].unique().tolist() == [0, 3, 6]
    assert run.read("steps")["step"].tolist() == list(range(7))


def test_nan_loss_is_recorded_as_a_spike_and_training_goes_on(tmp_path: Path) -> None:
    t = small.trainer()
    with small.watch(t, tmp_path / "run") as monitor:
        for step in range(3):
            small.train(t, 1, None, start=step)
            monitor.step(math.nan if step == 0 else 2.0)
    run = geodiag.open_run(tmp_path / "run")
    assert run.read("steps")["loss"].isna().tolist() == [True, False, False]
    assert run.read("events")["kind"].tolist()[:2] == ["attempt", "nonfinite"]


def test_a_failing_hook_is_reported_once_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bare = small.train(small.trainer(), 4)
    t = small.trainer()
    with small.watch(t, tmp_path / "run") as monitor, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "geodiag.hooks.measure.formulas.entropy",
            lambda _: (_ for _ in ()).throw(RuntimeError("no entropy")),
        )
        assert small.train(t, 4, monitor) == bare
    printed = capsys.readouterr().err
    assert printed.count("could not record routers") == 1
    events = geodiag.open_run(tmp_path / "run").read("events")
    assert (events["kind"] == "problem").sum() == 1
    layers = geodiag.open_run(tmp_path / "run").read("layers")
    assert layers["router_entropy"].isna().all()
    assert layers["amax_gain_fwd"].notna().all(), "what is not broken is recorded all the same"
    assert geodiag.open_run(tmp_path / "run").read("steps")["step"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "broken", ["measure.forward_hooks.ForwardHooks.summarise", "probes.runner.Probes.run"]
)
def test_a_failure_at_the_end_of_a_step_is_reported_once_and_the_loss_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture, broken: str
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no measure")

    bare = small.train(small.trainer(), 6)
    t = small.trainer()
    with small.watch(t, tmp_path / "run", probe_every=1) as monitor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"geodiag.hooks.{broken}", fail)
            losses = small.train(t, 4, monitor)
        losses += small.train(t, 2, monitor, start=4)
        assert monitor.slots.slots == 1, "what a failed step left behind must not pile up"
    assert losses == bare
    assert capsys.readouterr().err.count("no measure") == 1
    run = geodiag.open_run(tmp_path / "run")
    np.testing.assert_allclose(run.read("steps")["loss"], bare, rtol=1e-6)
    assert {4, 5} <= set(run.read("layers")["step"]), "it is tried again at every step"


def test_close_removes_all_hooks(tmp_path: Path) -> None:
    t = small.trainer()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in t.model.modules())

    before = hooks()
    with small.watch(t, tmp_path / "run"):
        assert hooks() > before
    assert hooks() == before


def test_a_model_without_experts_is_recorded_as_far_as_it_goes(tmp_path: Path) -> None:
    model = small.Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with geodiag.attach(model, optimizer, tmp_path / "run", quiet=True) as monitor:
        for step in range(3):
            ids = small.tokens(step)
            loss = torch.nn.functional.cross_entropy(
                model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss)
    run = geodiag.open_run(tmp_path / "run")
    rows = run.read("layers")
    assert len(rows) == 9
    assert rows["stream_rms"].notna().all()
    assert rows["transport_gain_bwd"].notna().all()
    assert rows["amax_gain_fwd"].isna().all()
    assert any("no router" in m for m in run.manifest["found"]["missing"])
    assert run.read("steps")["grad_norm"].notna().all()


def test_a_model_without_blocks_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(GeodiagError, match="attach to the module that holds the decoder's layers"):
        geodiag.attach(torch.nn.Linear(2, 2), None, tmp_path / "run")


def test_the_detectors_events_reach_the_run(tmp_path: Path) -> None:
    t = small.trainer()
    with small.watch(t, tmp_path / "run") as monitor:
        for step in range(120):
            monitor.step(3.0 + 0.01 * math.sin(step) + (2.0 if 90 <= step < 100 else 0.0))
    events = geodiag.open_run(tmp_path / "run").read("events")
    spikes = events[events.kind == "spike"]
    assert len(spikes) == 1
    assert 90 <= spikes.iloc[0]["step"] <= 93
    assert (events["kind"] == "recovered").sum() == 1
    assert "would have acted" in events[events.kind == "decision"].iloc[0]["message"]


def test_a_run_that_is_started_again_is_another_attempt_and_replaces_nothing(
    tmp_path: Path,
) -> None:
    for start, steps in ((0, 4), (2, 3)):
        t = small.trainer()
        with small.watch(t, tmp_path / "run", first_step=start) as monitor:
            small.train(t, steps, monitor, start=start)
    run = geodiag.open_run(tmp_path / "run")
    assert run.read("steps")[["step", "attempt"]].to_numpy().tolist() == [
        [0, 0],
        [1, 0],
        [2, 1],
        [3, 1],
        [4, 1],
    ]
    assert len(run.read("steps", attempt="all")) == 7
    events = run.read("events")
    assert events[events["kind"] == "attempt"]["message"].tolist() == [
        "training began",
        "training began again: attempt 1",
    ]
