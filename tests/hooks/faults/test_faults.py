"""Planted faults: each changes exactly what it says, for as long as it says, and nothing else."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geodiag.errors import GeodiagError
from geodiag.hooks.adapters import Layout, find_layout
from geodiag.hooks.faults import KINDS, LASTING, Fault, Faults, page
from geodiag.reference_models.train import Trainer
from tests.hooks import small
from tests.hooks.adapters import tiny_v4
from tests.paths import ROOT

State = dict[str, Tensor]


def state(t: Trainer) -> State:
    """Weights, buffers and what the optimizers remember."""
    kept = {k: v.clone() for k, v in t.model.state_dict().items()}
    for i, optimizer in enumerate(t.optimizers):
        for j, memory in optimizer.state_dict()["state"].items():
            kept |= {
                f"optimizer {i} {j} {k}": torch.as_tensor(v).clone() for k, v in memory.items()
            }
    return kept


def changed(before: State, after: State) -> dict[str, Tensor]:
    """Name → where it changed."""
    assert before.keys() == after.keys()
    return {k: (before[k] != after[k]) for k in before if not torch.equal(before[k], after[k])}


def planted(
    text: str, t: Trainer, **changes: Any
) -> tuple[State, State, Fault, list[dict[str, Any]]]:
    """State before and after the step's faults are planted; the fault as placed; what was told."""
    told: list[dict[str, Any]] = []
    faults = Faults(
        [Fault.parse(text)], find_layout(t.model), lambda *a, **k: told.append({"a": a, **k})
    )
    for step in range(faults.faults[0].step):
        before = state(t)
        faults.before_step(step)
        assert changed(before, state(t)) == {}, "nothing happens before its step"
    before = state(t)
    faults.before_step(faults.faults[0].step)
    return before, state(t), faults.faults[0], told


@pytest.fixture
def trained() -> Trainer:
    t = small.trainer()
    small.train(t, 2)
    return t


# -- weights -----------------------------------------------------------------------------------


def test_expert_scale_multiplies_one_experts_gate_and_up(trained: Trainer) -> None:
    before, after, _, told = planted("expert-scale@5:2=7", trained)
    where = changed(before, after)
    assert list(where) == ["layers.2.moe.experts.gate_up"]
    assert [bool(e.all()) for e in where["layers.2.moe.experts.gate_up"]] == [
        False,
        True,
        False,
        False,
    ]
    assert torch.equal(
        after["layers.2.moe.experts.gate_up"][1], 7 * before["layers.2.moe.experts.gate_up"][1]
    )
    assert told == [
        {
            "a": ("fault", "planted expert-scale: one expert's gate and up weights times 7"),
            "layer": 2,
            "expert": 1,
            "data": {"kind": "expert-scale", "magnitude": 7.0, "last_step": 5},
        }
    ]


def test_gate_column_multiplies_one_experts_row_of_the_router(trained: Trainer) -> None:
    before, after, _, told = planted("gate-column@3:1", trained)
    name = "layers.1.moe.router.weight"
    assert list(changed(before, after)) == [name]
    assert torch.equal(after[name][3], 30 * before[name][3])
    assert torch.equal(after[name][:3], before[name][:3])
    assert told[0]["expert"] == 3


def test_router_shift_adds_noise_of_that_many_standard_deviations(trained: Trainer) -> None:
    before, after, *_ = planted("router-shift@3:1=2", trained)
    name = "layers.1.moe.router.weight"
    assert list(changed(before, after)) == [name]
    noise = (after[name] - before[name]) / (2 * before[name].std())
    assert 0.7 < noise.std().item() < 1.3
    assert abs(noise.mean().item()) < 0.4


@pytest.mark.parametrize("step", range(8))
def test_router_permute_leaves_no_row_where_it_was(trained: Trainer, step: int) -> None:
    before, after, *_ = planted(f"router-permute@{step}:1", trained)
    name = "layers.1.moe.router.weight"
    assert list(changed(before, after)) == [name]
    assert sorted(before[name].tolist()) == sorted(after[name].tolist())
    assert not any(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))


def test_bias_kick_moves_one_experts_bias(trained: Trainer) -> None:
    before, after, *_ = planted("bias-kick@6:2=0.5", trained)
    name = "layers.2.moe.router.balance"
    assert list(changed(before, after)) == [name]
    torch.testing.assert_close(after[name] - before[name], torch.tensor([0.0, 0.0, 0.5, 0.0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("magnitude", "bit"), [("", -2), ("=-1", -1), ("=3", 3)])
def test_bit_flip_flips_one_bit_of_the_largest_gate_weight(
    dtype: str, magnitude: str, bit: int
) -> None:
    t = small.trainer(dtype=dtype, expert_dim=16)
    before, after, *_ = planted(f"bit-flip@5:1{magnitude}", t)
    name = "layers.1.moe.experts.gate_up"
    where = changed(before, after)
    assert list(where) == [name]
    gate = before[name][1].chunk(2, -1)[0]
    (place,) = where[name].nonzero().tolist()
    assert place[0] == 1
    assert gate[place[1], place[2]].abs() == gate.abs().max()
    whole, bits = (torch.int32, 32) if dtype == "float32" else (torch.int16, 16)
    a, b = (
        s[name][tuple(place)].reshape(1).view(whole).item() & (2**bits - 1) for s in (before, after)
    )
    assert a ^ b == 1 << (bit % bits)


def test_the_default_bit_makes_a_weight_enormous_in_every_type() -> None:
    for dtype in ("float32", "bfloat16"):
        _, after, *_ = planted("bit-flip@5:1", small.trainer(dtype=dtype, expert_dim=16))
        assert after["layers.1.moe.experts.gate_up"].abs().max() > 1e30


@pytest.mark.parametrize("magnitude", ["32", "-33"])
def test_a_bit_that_the_weights_do_not_have_is_refused(trained: Trainer, magnitude: str) -> None:
    with pytest.raises(
        GeodiagError, match="flips nothing: the weights have 32 bits; pass -32 to 31"
    ):
        planted(f"bit-flip@0={magnitude}", trained)


# -- what lasts --------------------------------------------------------------------------------


def lasting(t: Trainer, text: str) -> tuple[Faults, range]:
    faults = Faults([Fault.parse(text)], find_layout(t.model))
    first = faults.faults[0]
    assert first.last_step - first.step + 1 == LASTING
    return faults, range(first.step, first.last_step + 1)


def test_residual_expand_multiplies_h_res_of_both_sites_while_it_lasts(trained: Trainer) -> None:
    faults, during = lasting(trained, "residual-expand@3:1=2")
    block = trained.model.blocks[1]
    plain = [m(torch.ones(1, 1, 4, 16)) for m in (block.attn_hc, block.ffn_hc)]
    other = trained.model.blocks[2].attn_hc(torch.ones(1, 1, 4, 16))
    before = state(trained)
    for step in range(15):
        faults.before_step(step)
        factor = 2 if step in during else 1
        for m, mix in zip((block.attn_hc, block.ffn_hc), plain, strict=True):
            now = m(torch.ones(1, 1, 4, 16))
            assert torch.equal(now.res_TNN, factor * mix.res_TNN)
            assert torch.equal(now.pre_TN, mix.pre_TN)
            assert torch.equal(now.post_TN, mix.post_TN)
        assert torch.equal(
            trained.model.blocks[2].attn_hc(torch.ones(1, 1, 4, 16)).res_TNN, other.res_TNN
        )
    assert changed(before, state(trained)) == {}


def test_block_scale_multiplies_the_feed_forward_output_while_it_lasts(trained: Trainer) -> None:
    faults, during = lasting(trained, "block-scale@3:1=5")
    block, x, ids = trained.model.blocks[1], torch.randn(1, 6, 16), torch.arange(6)[None]
    plain, attention = block.moe(x, ids), block.attn(x, trained.model.rotary)
    before = state(trained)
    for step in range(15):
        faults.before_step(step)
        factor = 5 if step in during else 1
        assert torch.equal(block.moe(x, ids).hidden_BSC, factor * plain.hidden_BSC)
        assert torch.equal(block.attn(x, trained.model.rotary), attention)
    assert changed(before, state(trained)) == {}


def test_grad_scale_multiplies_one_layers_gradients_before_clipping(trained: Trainer) -> None:
    faults, during = lasting(trained, "grad-scale@3:1=8")

    def gradients() -> dict[str, Tensor]:
        ids = small.tokens(0)
        trained.model.zero_grad()
        trained.model.loss(trained.model(ids[:, :-1]), ids[:, 1:]).total.backward()
        return {
            n: p.grad.clone() for n, p in trained.model.named_parameters() if p.grad is not None
        }

    plain = gradients()
    for step in range(15):
        faults.before_step(step)
        for name, grad in gradients().items():
            factor = 8 if step in during and name.startswith("layers.1.") else 1
            torch.testing.assert_close(grad, factor * plain[name], rtol=1e-6, atol=0)


def test_grad_scale_shows_in_the_recorded_gradient_norms(tmp_path: Path) -> None:
    import geodiag

    t = small.trainer()
    with small.watch(t, tmp_path / "run") as monitor:
        faults = Faults([Fault.parse("grad-scale@3:1=1000")], monitor.layout, monitor.event)
        for step in range(5):
            faults.before_step(step)
            small.train(t, 1, monitor, start=step)
    run = geodiag.open_run(tmp_path / "run")
    rows = run.read("layers")
    norms = rows[rows.site == "ffn"].set_index(["step", "layer"])["grad_norm"]
    assert norms[3, 1] > 100 * norms[2, 1]
    assert norms[3, 2] < 10 * norms[2, 2]
    events = run.read("events")
    (event,) = events[events.kind == "fault"].to_dict("records")
    assert (event["kind"], event["step"], event["layer"]) == ("fault", 3, 1)


def test_lr_shock_scales_the_learning_rate_while_it_lasts(trained: Trainer) -> None:
    faults, during = lasting(trained, "lr-shock@3=4")
    before = state(trained)
    for step in range(15):
        faults.before_step(step)
        assert faults.lr_scale == (4 if step in during else 1)
    assert changed(before, state(trained)) == {}


def test_far_batch_is_other_noise_each_step_and_the_same_each_time(trained: Trainer) -> None:
    """Also for later steps: anticipatory routing fetches their batches ahead."""
    faults, during = lasting(trained, "far-batch@3")
    again, _ = lasting(trained, "far-batch@3")
    ids, before = small.tokens(0), small.tokens(0)
    for step in range(15):
        tokens = faults.batch(step, ids, small.VOCAB)
        assert torch.equal(tokens, again.batch(step, ids, small.VOCAB))
        if step in during:
            assert not torch.equal(tokens, ids)
            assert not torch.equal(tokens, before)
            assert tokens.shape == ids.shape
            assert tokens.dtype == ids.dtype
            assert 0 <= int(tokens.min()) <= int(tokens.max()) < small.VOCAB
        else:
            assert tokens is ids
        before = tokens


def hooks(t: Trainer) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in t.model.modules())
    return modules + sum(len(p._backward_hooks or {}) for p in t.model.parameters())


@pytest.mark.parametrize(
    "kind", ["residual-expand", "block-scale", "grad-scale", "lr-shock", "far-batch"]
)
def test_what_lasts_is_taken_back(trained: Trainer, kind: str) -> None:
    """After its last step; at `remove`; and where a training goes back before it began."""
    assert KINDS[kind].lasts
    none = hooks(trained)
    for end in ("last step", "remove", "back"):
        faults, during = lasting(trained, f"{kind}@3")
        faults.before_step(3)
        if kind in ("residual-expand", "block-scale", "grad-scale"):
            assert hooks(trained) > none
        if end == "remove":
            faults.remove()
        else:
            faults.before_step(during[-1] + 1 if end == "last step" else 2)
        assert hooks(trained) == none
        assert faults.lr_scale == 1


def test_a_training_that_resumes_within_a_fault_has_the_rest_of_it(trained: Trainer) -> None:
    faults, _ = lasting(trained, "lr-shock@3=4")
    faults.before_step(8)
    assert faults.lr_scale == 4
    faults.before_step(13)
    assert faults.lr_scale == 1


def test_a_fault_is_planted_once_where_a_training_goes_back(trained: Trainer) -> None:
    faults = Faults([Fault.parse("expert-scale@3:1")], find_layout(trained.model))
    faults.before_step(3)
    before = state(trained)
    faults.before_step(1)
    faults.before_step(3)
    assert changed(before, state(trained)) == {}


def test_several_faults_add_up(trained: Trainer) -> None:
    parsed = [
        Fault.parse("lr-shock@3=4"),
        Fault.parse("lr-shock@5=2"),
        Fault.parse("bias-kick@5:1"),
    ]
    faults, scales = Faults(parsed, find_layout(trained.model)), []
    for step in range(16):
        faults.before_step(step)
        scales.append(faults.lr_scale)
    assert scales == [1] * 3 + [4] * 2 + [8] * 8 + [2] * 2 + [1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_fault_does_the_same_to_the_same_training(kind: str) -> None:
    def losses(text: str) -> list[float]:
        t = small.trainer()
        faults = Faults([Fault.parse(text)], find_layout(t.model))
        out = []
        for step in range(5):
            faults.before_step(step)
            t.lr_scale = faults.lr_scale
            ids = small.tokens(step)
            noisy = torch.cat([faults.batch(step, ids[:, :-1], small.VOCAB), ids[:, -1:]], 1)
            out.append(small.one_step(t, noisy))
        return out

    text = f"{kind}@2"
    plain = small.train(small.trainer(), 5)
    first = losses(text)
    np_equal = [
        a == b or (math.isnan(a) and math.isnan(b))
        for a, b in zip(first, losses(text), strict=True)
    ]
    assert all(np_equal)
    assert first[:2] == plain[:2]
    assert first[2:] != plain[2:], "the fault must be felt"


# -- what grows --------------------------------------------------------------------------------


def grown(t: Trainer, text: str) -> tuple[Faults, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    return Faults(
        [Fault.parse(text)], find_layout(t.model), lambda *a, **k: told.append({"a": a, **k})
    ), told


def test_a_fault_of_a_weight_grows_in_the_expert_where_it_began(trained: Trainer) -> None:
    faults, told = grown(trained, "expert-scale@3-5:1=2")
    name, scales = "layers.1.moe.experts.gate_up", []
    was = state(trained)[name]
    for step in range(8):
        faults.before_step(step)
        now = state(trained)[name]
        scales.append((now[3] / was[3]).nanmedian().item())
        assert torch.equal(now[:3], was[:3])
    assert scales == [1, 1, 1, 2, 4, 8, 8, 8]
    (said,) = told
    assert (
        said["a"][1] == "planted expert-scale: one expert's gate and up weights times 2, "
        "again at every step to 5"
    )
    assert said["data"]["last_step"] == 5


@pytest.mark.parametrize("kind", ["block-scale", "residual-expand", "grad-scale", "lr-shock"])
def test_what_lasts_grows_and_is_taken_back_whole(trained: Trainer, kind: str) -> None:
    block, x, ids = trained.model.blocks[1], torch.randn(1, 6, 16), torch.arange(6)[None]
    weight = next(block.parameters())

    def size(faults: Faults) -> float:
        if kind == "lr-shock":
            return faults.lr_scale
        if kind == "grad-scale":
            trained.model.zero_grad()
            weight.sum().backward()
            return weight.grad.mean().item()
        if kind == "block-scale":
            return block.moe(x, ids).hidden_BSC.norm().item()
        return block.attn_hc(torch.ones(1, 1, 4, 16)).res_TNN.norm().item()

    text, none = f"{kind}@3-5{':1' if KINDS[kind].place else ''}=2", hooks(trained)
    faults, _ = grown(trained, text)
    plain, sizes = size(faults), []
    for step in range(17):
        faults.before_step(step)
        sizes.append(size(faults) / plain)
    assert sizes == pytest.approx([1] * 3 + [2, 4] + [8] * LASTING + [1] * 2, rel=1e-5)
    assert hooks(trained) == none
    again, _ = grown(trained, text)
    again.before_step(4)  # a training that resumes here
    assert size(again) / plain == pytest.approx(4, rel=1e-5)


# -- where it can be planted ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if v.place])
def test_without_a_layer_it_is_the_middle_one_that_can_take_it(trained: Trainer, kind: str) -> None:
    *_, fault, told = planted(f"{kind}@1", trained)
    routers = kind in ("gate-column", "router-shift", "router-permute", "bias-kick")
    assert fault.layer == told[0]["layer"] == (2 if routers else 1)  # layer 0 is routed by hash


@pytest.mark.parametrize("kind", ["gate-column", "router-shift", "router-permute", "bias-kick"])
def test_a_hash_routed_layer_takes_no_router_fault(trained: Trainer, kind: str) -> None:
    with pytest.raises(
        GeodiagError, match=f"^{kind} cannot be planted in layer 0; layers that can take it: 1, 2$"
    ):
        planted(f"{kind}@1:0", trained)


def test_a_layer_that_is_not_there_is_refused(trained: Trainer) -> None:
    with pytest.raises(GeodiagError, match="in layer 9; layers that can take it: 0, 1, 2"):
        planted("block-scale@1:9", trained)


def test_a_plain_residual_has_no_map_to_expand() -> None:
    with pytest.raises(
        GeodiagError,
        match=r"^residual-expand cannot be planted: a reference \(plain\) model has no",
    ):
        planted("residual-expand@1", small.trainer("plain"))


def without_bias(layout: Layout, layer: int | None = None) -> Layout:
    routers = [
        replace(r, bias=lambda: None) if layer in (None, r.layer) else r for r in layout.routers
    ]
    return replace(layout, routers=routers)


def test_a_router_without_bias_takes_no_bias_kick(trained: Trainer) -> None:
    layout = find_layout(trained.model)
    with pytest.raises(GeodiagError, match="bias-kick cannot be planted: a"):
        Faults([Fault.parse("bias-kick@1")], without_bias(layout))
    with pytest.raises(GeodiagError, match="in layer 2; layers that can take it: 1"):
        Faults([Fault.parse("bias-kick@1:2")], without_bias(layout, 2))
    assert Faults([Fault.parse("router-shift@1:2")], without_bias(layout))


def test_a_stack_of_blocks_takes_what_needs_no_experts() -> None:
    layout = find_layout(small.Blocks())
    for kind, spec in KINDS.items():
        if spec.place in (None, "block"):
            Faults([Fault.parse(f"{kind}@1")], layout)
        else:
            with pytest.raises(GeodiagError, match="has no place for it"):
                Faults([Fault.parse(f"{kind}@1")], layout)


# -- how it is written ---------------------------------------------------------------------------


def test_every_part_of_a_fault_is_read() -> None:
    assert Fault.parse("expert-scale@120:3=30.5") == Fault(
        kind="expert-scale", step=120, layer=3, magnitude=30.5
    )
    assert Fault.parse("block-scale@7=-1e-3") == Fault(
        kind="block-scale", step=7, layer=None, magnitude=-0.001
    )
    assert Fault.parse("far-batch@0") == Fault(kind="far-batch", step=0, layer=None, magnitude=None)
    assert Fault.parse("bit-flip@1").magnitude == -2
    grows = Fault.parse("lr-shock@10-40=1.1")
    assert (grows.step, grows.until, grows.planted) == (10, 40, range(10, 41))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"),
        ("expert-scale", "write KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"),
        ("expert-scale@", "write KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"),
        ("expert-scale@-5", "write KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"),
        ("expert-scale@5:", "write KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"),
        ("expert-scale@5=", "write KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"),
        ("expert-scale@5=2:1", "the magnitude '2:1' is no finite number"),
        ("expert-scale@5\n", "write KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"),
        ("expert-scale@٥", "write KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"),
        ("expert-shrink@5", "unknown fault kind 'expert-shrink'; one of expert-scale, gate-column"),
        ("expert-scale@5=big", "the magnitude 'big' is no finite number"),
        ("expert-scale@5=1e999", "the magnitude '1e999' is no finite number"),
        ("expert-scale@5=nan", "the magnitude 'nan' is no finite number"),
        ("bit-flip@5=2.5", "the magnitude '2.5' is no whole number"),
        ("router-permute@5=2", "router-permute has no magnitude; leave out =2"),
        ("far-batch@5:1", "far-batch belongs to no layer; write far-batch@5"),
        ("far-batch@5-9", "far-batch cannot grow; write far-batch@5"),
        ("bit-flip@5-9", "bit-flip cannot grow; write bit-flip@5"),
        ("bias-kick@5-5", "bias-kick@5-5 ends before it grows; write FIRST-LAST, e.g. 5-35"),
        (
            "lr-shock@5-500=10",
            "lr-shock@5-500=10 grows beyond the largest float; "
            "pass a smaller MAGNITUDE, or fewer steps",
        ),
        ("bias-kick@5-", "write KIND@STEP[-LAST][:LAYER][=MAGNITUDE]"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(text: str, said: str) -> None:
    with pytest.raises(GeodiagError) as error:
        Fault.parse(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_page_of_faults_is_the_table_of_kinds_printed() -> None:
    assert (ROOT / "docs/faults.md").read_text() == page(), "run make docs"
    assert all(f"| `{kind}` |" in page() for kind in KINDS)


def test_faults_are_public_and_planted_in_anyones_model() -> None:
    import geodiag

    model, told = tiny_v4.model(), []
    faults = geodiag.faults.plant(
        model, "gate-column@2:1=4", "lr-shock@1=3", tell=lambda kind, *a, **k: told.append(k)
    )
    faults.before_step(0)
    assert (faults.lr_scale, told) == (1.0, [])
    faults.before_step(1)
    faults.before_step(2)
    assert faults.lr_scale == 3
    assert [t["data"]["kind"] for t in told] == ["lr-shock", "gate-column"]
    with pytest.raises(GeodiagError, match="unknown fault kind"):
        geodiag.faults.plant(model, "earthquake@2")
