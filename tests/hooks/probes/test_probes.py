"""Probes on the reference model and on transformers' DeepSeek-V4, against their definitions in
float64.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from geodiag.hooks.adapters import find_layout
from geodiag.hooks.failure_guard import FailureGuard, RaisingGuard
from geodiag.hooks.measure.step_values import TRACED_EXPERTS, TRACED_IDS, TRACED_TOKENS
from geodiag.hooks.probes import perturbation_growth as growth
from geodiag.hooks.probes import probe_forward as look
from geodiag.hooks.probes.curvature import directions
from geodiag.hooks.probes.runner import PROBES, Probes
from geodiag.hooks.probes.token_trace import TRACED, choose
from geodiag.metrics.registry import keys_of
from tests.hooks import slow, small
from tests.hooks.adapters import tiny_v4
from tests.hooks.probes.test_expert_block import slow_block, slow_curvature

MODELS = ("reference", "deepseek_v4")
ALL = frozenset().union(*(keys_of(group) for group in PROBES))


class Subject:
    """A model with its layout, its probe batch and its probes."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        if name == "reference":
            self.model: Any = small.trainer(options.pop("residual", "mhc"), swiglu_limit=0.3).model
            self.blocks, self.moes = self.model.blocks, [b.moe for b in self.model.blocks]
            self.ids, self.batch = small.tokens(7)[:, :-1], (small.tokens(7)[:, :-1],)
        else:
            self.model = tiny_v4.model(options.pop("implementation", "eager"))
            self.blocks = list(self.model.model.layers)
            self.moes = [b.mlp for b in self.blocks]
            self.ids = tiny_v4.tokens(7)
            self.batch = {"input_ids": self.ids}  # type: ignore[assignment]
        self.layout = replace(find_layout(self.model), watched=options.pop("watched", None))
        self.probes = Probes(self.model, self.layout, RaisingGuard(), batch=self.batch, **options)

    def __call__(self) -> Any:
        return (
            self.model(*self.batch) if isinstance(self.batch, tuple) else self.model(**self.batch)
        )

    def train(self) -> None:
        """Moves the weights, so that choices flip."""
        generator = torch.Generator().manual_seed(1)
        for p in self.model.parameters():
            p.data += 0.15 * p.data.abs().mean() * torch.randn(p.shape, generator=generator)

    def choices(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By layer: input of the block, ids and weights, from separate hooks in eval mode."""
        seen: list[Any] = [None] * len(self.moes)
        inputs: list[Any] = [None] * len(self.moes)
        handles = []
        for i, moe in enumerate(self.moes):
            gate = moe.router if self.name == "reference" else moe.gate
            handles.append(
                gate.register_forward_hook(lambda _m, _a, out, i=i: seen.__setitem__(i, out))
            )
            handles.append(
                moe.register_forward_pre_hook(
                    lambda _m, args, i=i: inputs.__setitem__(i, args[0].detach().flatten(0, 1))
                )
            )
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self()
        self.model.train(training)
        for handle in handles:
            handle.remove()
        if self.name == "reference":
            return [(x, r.expert_ids_TK, r.weights_TK) for x, r in zip(inputs, seen, strict=True)]
        return [(x, out[2], out[1]) for x, out in zip(inputs, seen, strict=True)]

    def reweighed(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """Today's gate weights for another choice, in float64."""
        if self.name == "reference":
            router = self.moes[layer].router
            scores = (
                torch.nn.functional.softplus(x.double() @ router.weight.double().T)
                .sqrt()
                .gather(1, ids)
            )
            return scores / scores.sum(-1, keepdim=True) * router.scale
        gate = self.moes[layer].gate
        scores = (
            torch.nn.functional.softplus(x.double() @ gate.weight.double().T).sqrt().gather(1, ids)
        )
        return scores / scores.sum(-1, keepdim=True) * gate.routed_scaling_factor

    def block(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return slow_block(self.name, self.moes[layer], x, ids, weights)


@pytest.fixture(params=MODELS)
def twice(request: Any) -> tuple[Subject, list, list, dict[str, Tensor]]:
    """A subject probed before and after its weights moved: choices then and now, and the second
    probe's values.
    """
    subject = Subject(request.param, by_domain=True)
    then = subject.choices()
    first = subject.probes.run(ALL)
    assert not {"layers.flip_rate", "layers.tear", "tokens.flipped", "domains.flip_rate"} & set(
        first
    )
    subject.train()
    return subject, then, subject.choices(), subject.probes.run(ALL)


def test_every_group_gives_its_values(twice: tuple) -> None:
    *_, values = twice
    got = set(values)
    for name in (
        "flip_rate",
        "flip_top1",
        "flip_any",
        "tear",
        "tear_flipped",
        "spectral_norm_router",
    ):
        assert f"layers.{name}" in got
    for name in (
        "curvature",
        "curvature_max",
        "spectral_norm_gate",
        "spectral_norm_up",
        "spectral_norm_down",
    ):
        assert f"layers.{name}" in got
    assert {"layers.perturbation_growth", "experts.curvature", TRACED_TOKENS, TRACED_IDS} <= got
    assert {
        "tokens.norm",
        "tokens.projection_2",
        TRACED_EXPERTS,
        "tokens.margin",
        "tokens.flipped",
    } <= got
    assert {"domains.flip_rate", "domains.clamp_gate_rate"} <= got
    assert "layers.attn_logit_max" in got


def test_flips_and_tear_follow_their_definitions(twice: tuple) -> None:
    subject, then, now, values = twice
    assert values["layers.flip_rate"][0] == values["layers.tear"][0] == 0, "a hash never flips"
    assert values["layers.tear_flipped"][0].isnan()
    for layer in (1, 2):
        (_, old, _), (x, ids, weights) = then[layer], now[layer]
        assert values["layers.flip_rate"][layer].item() == pytest.approx(
            slow.flip_rate(ids.tolist(), old.tolist())
        )
        today = subject.block(layer, x, ids, weights)
        jump = subject.block(layer, x, old, subject.reweighed(layer, x, old)) - today
        share = jump.norm(dim=-1) / today.norm(dim=-1)
        flipped = torch.tensor(
            [set(a) != set(b) for a, b in zip(ids.tolist(), old.tolist(), strict=True)]
        )
        assert 0 < flipped.sum() < look.pick_flipped(flipped).numel(), (
            "all flipped tokens must have room"
        )
        assert values["layers.tear"][layer].item() == pytest.approx(share.mean().item(), rel=1e-3)
        assert values["layers.tear_flipped"][layer].item() == pytest.approx(
            share[flipped].mean().item(), rel=1e-3
        )
        yesterday = subject.block(layer, x, old, weights) - today
        twin = (yesterday.norm(dim=-1) / today.norm(dim=-1)).mean().item()
        assert values["layers.tear"][layer].item() != pytest.approx(twin, rel=2e-3), (
            "today's weights must be regathered"
        )


def test_curvature_follows_its_definition_by_layer_and_by_expert(twice: tuple) -> None:
    subject, _, now, values = twice
    for layer in range(3):
        x, ids, weights = now[layer]
        at = torch.linspace(0, len(x) - 1, look.CURVED_TOKENS).long()
        x, ids, weights = x[at], ids[at], weights[at]
        expected = slow_curvature(
            subject.name,
            subject.moes[layer],
            x,
            ids,
            weights,
            directions(len(x), x.shape[1], x.device),
        )
        assert values["layers.curvature"][layer].item() == pytest.approx(
            expected.mean().item(), rel=5e-2
        )
        assert values["layers.curvature_max"][layer].item() == pytest.approx(
            expected.max().item(), rel=5e-2
        )
        for expert in range(values["experts.curvature"].shape[1]):
            chose = (ids == expert).any(-1)
            mean = expected[chose].mean().item() if chose.any() else float("nan")
            assert values["experts.curvature"][layer, expert].item() == pytest.approx(
                mean, rel=5e-2, nan_ok=True
            )
        assert expected.max() > 1.2 * expected.mean(), (
            "mean and worst must differ, or one could stand for the other"
        )


def streams_at(subject: Subject) -> list[Tensor]:
    """The streams after each site, (T, N·C) in float64, by hooks of our own."""
    seen: list[Tensor] = []
    handles = []

    def keep(x: Tensor) -> None:
        seen.append(x.detach().flatten(0, 1).flatten(1).double())

    for block in subject.blocks:
        for connection in (block.attn_hc, block.ffn_hc):
            handles.append(connection.register_forward_hook(lambda _m, args, _o: keep(args[0])))
    end = subject.model.read_out if subject.name == "reference" else subject.model.model.hc_head
    handles.append(end.register_forward_pre_hook(lambda _m, args: keep(args[0])))
    subject.choices()
    for handle in handles:
        handle.remove()
    return seen[1:]


def test_traced_tokens_are_where_the_streams_say(twice: tuple) -> None:
    subject, then, now, values = twice
    at = values[TRACED_TOKENS].long()
    assert len(at) == TRACED
    assert values[TRACED_IDS].tolist() == subject.ids.flatten()[at].tolist()
    streams = streams_at(subject)
    traced = torch.stack(
        [values[f"tokens.{n}"] for n in ("norm", "projection_1", "projection_2")], -1
    )
    assert traced.shape == (6, TRACED, 3)
    r1, r2 = subject.probes._forward._project._directions.double().T  # type: ignore[union-attr]
    assert abs(r1.dot(r2).item()) < 1e-6
    assert r1.norm().item() == pytest.approx(1, abs=1e-6) == r2.norm().item()
    for place, x in enumerate(streams):
        expected = torch.stack([x[at].norm(dim=1), x[at] @ r1, x[at] @ r2], 1)
        torch.testing.assert_close(traced[place].double(), expected, rtol=1e-4, atol=1e-5)
    before = torch.stack([streams[0][at] @ r1, streams[0][at] @ r2], 1)
    after = torch.stack([streams[-1][at] @ r1, streams[-1][at] @ r2], 1)
    assert (before - after).abs().max() > 1e-3, "the twin: sites must not be mixed up"
    for layer in range(3):
        _, ids, weights = now[layer]
        heavy = ids[at].gather(1, weights[at].argsort(1, descending=True))
        assert values[TRACED_EXPERTS][layer].tolist() == heavy.tolist()
        share = [
            slow.flip_rate([a], [b])
            for a, b in zip(ids[at].tolist(), then[layer][1][at].tolist(), strict=True)
        ]
        assert values["tokens.flipped"][layer].tolist() == pytest.approx(share)
    assert values["tokens.margin"][0].isnan().all()
    assert values["tokens.flipped"].amax(0).gt(0).sum() >= TRACED - 1, (
        "those that flipped come first"
    )


def test_tokens_are_chosen_by_place_by_margin_or_by_flips() -> None:
    flips = torch.tensor([[0.0, 0.5, 0.0, 1.0], [0.0, 0.5, 0.0, 0.5]])
    margins = torch.tensor([[0.9, 0.8, 0.1, 0.7], [0.2, 0.9, 0.9, 0.9]])
    cpu = torch.device("cpu")
    assert choose([3, 1, 3], flips, margins, 4, cpu).tolist() == [1, 3]
    many = torch.cat([flips, torch.zeros(2, 20)], 1), torch.cat([margins, torch.rand(2, 20) + 2], 1)
    assert set(choose("flipped", *many, 24, cpu).tolist()) > {0, 1, 2, 3}
    assert choose("margin", *many, 24, cpu).tolist()[:4] == [0, 1, 2, 3]
    assert choose("flipped", None, None, 4, cpu).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no token 4; pass 0 to 3"):
        choose([4], flips, margins, 4, cpu)


def slow_growth(subject: Subject, layer: int) -> float:
    """Two forwards, the second with the layer's input moved; the first sequence only."""
    kept: dict[str, Tensor] = {}
    end = subject.model.read_out if subject.name == "reference" else subject.model.model.hc_head
    handle = end.register_forward_pre_hook(
        lambda _m, args: kept.__setitem__("end", args[0][0].double())
    )

    def move(_: Any, args: tuple, kwargs: dict) -> Any:
        x = args[0].clone()
        x[0] = growth._perturbed(args[0][0], layer)
        kept["change"] = (x[0] - args[0][0]).double()
        return (x, *args[1:]), kwargs

    with torch.no_grad():
        subject.model.eval()
        subject()
        still = kept["end"]
        moving = subject.blocks[layer].register_forward_pre_hook(move, with_kwargs=True)
        subject()
        moving.remove()
        subject.model.train()
    handle.remove()
    return ((kept["end"] - still).norm() / kept["change"].norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_growth_is_that_of_two_forwards(name: str) -> None:
    subject = Subject(name)
    got = subject.probes.run(frozenset({"layers.perturbation_growth"}))[
        "layers.perturbation_growth"
    ]
    expected = [slow_growth(subject, layer) for layer in range(3)]
    assert got.tolist() == pytest.approx(expected, rel=2e-3)
    assert max(expected) / min(expected) > 1.02, "the twin: layers must not be mixed up"


def test_the_change_is_small_random_and_the_same_every_time() -> None:
    x = torch.randn(5, 4, 16)
    moved = growth._perturbed(x, 1) - x
    torch.testing.assert_close(
        moved.flatten(1).norm(dim=1), growth.EPSILON * x.flatten(1).norm(dim=1)
    )
    assert torch.equal(growth._perturbed(x, 1), growth._perturbed(x, 1))
    assert not torch.equal(growth._perturbed(x, 1), growth._perturbed(x, 2))
    assert (
        abs(torch.nn.functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0))
        < 0.6
    )


def test_the_largest_attention_logit_is_that_of_all_queries() -> None:
    subject = Subject("reference")
    inputs: dict[int, tuple] = {}
    for i, block in enumerate(subject.blocks):
        block.attn.register_forward_pre_hook(lambda _m, args, i=i: inputs.__setitem__(i, args))
        block.attn.q_norm.weight.data.mul_(1 + i)
    subject.choices()
    got = subject.probes.run(frozenset({"layers.attn_logit_max"}))["layers.attn_logit_max"]
    from geodiag.reference_models.attention import rotate

    for i, block in enumerate(subject.blocks):
        x, rotary = inputs[i]
        qkv = (x.double() @ block.attn.qkv.weight.double().T).unflatten(-1, (3, 2, 8))

        def normed(t: Tensor, gain: Tensor) -> Tensor:
            return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()

        q = rotate(normed(qkv[..., 0, :, :], block.attn.q_norm.weight), rotary.double())
        k = rotate(normed(qkv[..., 1, :, :], block.attn.k_norm.weight), rotary.double())
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
        causal = torch.ones(small.SEQUENCE, small.SEQUENCE).tril().bool()
        assert got[i].item() == pytest.approx(logits[:, :, causal].max().item(), rel=1e-4)
    assert got[2] > 1.5 * got[0], "the twin: layers must not be mixed up"


def told_by_the_sinks(model: Any, ids: Tensor) -> list[Tensor]:
    """Layer by layer, the largest logit of a key: its weight against that of its head's sink, whose
    logit is known.
    """
    told = []
    for layer, weights_BHQK in zip(
        model.model.layers, model(ids, output_attentions=True).attentions, strict=True
    ):
        of_sink = 1 - weights_BHQK.sum(-1)
        sinks_H = layer.self_attn.sinks.view(1, -1, 1)
        told.append((sinks_H + (weights_BHQK.amax(-1) / of_sink).log()).amax())
    return told


def test_the_largest_attention_logit_of_deepseek_v4_is_what_its_own_weights_say() -> None:
    subject = Subject("deepseek_v4")
    model = subject.model.double().eval()
    for i, block in enumerate(subject.blocks):
        block.self_attn.kv_norm.weight.data.mul_(1 + i)
        block.self_attn.sinks.data.normal_(generator=torch.Generator().manual_seed(i))
    with torch.no_grad():
        expected = told_by_the_sinks(model, subject.ids)
    got = subject.probes.run(frozenset({"layers.attn_logit_max"}))["layers.attn_logit_max"]
    torch.testing.assert_close(got.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert got[2] > 1.5 * got[0], "the twin: layers must not be mixed up"


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "reference"])
def test_clamp_hits_and_flips_by_sequence_are_those_of_its_own_tokens(implementation: str) -> None:
    name = "reference" if implementation == "reference" else "deepseek_v4"
    options = {} if name == "reference" else {"implementation": implementation}
    subject = Subject(name, by_domain=True, **options)
    for p in (p for moe in subject.moes for p in moe.parameters()):
        p.data.mul_(3.0)
    subject.probes.run(ALL)
    then = subject.choices()
    subject.train()
    now, values = subject.choices(), subject.probes.run(ALL)
    limit = 0.3 if name == "reference" else tiny_v4.LIMIT
    hits, elements = np.zeros(4), 0
    for moe, (x, ids, _) in zip(subject.moes, now, strict=True):
        for t, (token, chosen) in enumerate(zip(x.double(), ids.tolist(), strict=True)):
            if name == "reference":
                gates = [token @ moe.experts.gate_up[e].double()[:, :12] for e in chosen]
                gates.append((moe.shared.gate_up.weight.double() @ token).chunk(2)[0])
            else:
                gates = [(moe.experts.gate_up_proj[e].double() @ token).chunk(2)[0] for e in chosen]
                gates.append(moe.shared_experts.gate_proj.weight.double() @ token)
            hits[t // 12] += sum((g > limit).sum().item() for g in gates)
            elements += sum(g.numel() for g in gates)
    assert values["domains.clamp_gate_rate"].tolist() == pytest.approx(
        4 * hits / elements, rel=1e-3
    )
    assert len(set(hits)) == 4, "the twin: sequences must differ"
    flips = np.array(
        [
            [slow.flip_rate([a], [b]) for a, b in zip(n[1].tolist(), t[1].tolist(), strict=True)]
            for n, t in zip(now[1:], then[1:], strict=True)
        ]
    )
    assert values["domains.flip_rate"].tolist() == pytest.approx(
        flips.mean(0).reshape(4, 12).mean(1)
    )


def trace_of(subject: Subject) -> Callable[[], list[Any]]:
    def state() -> list[Any]:
        model = subject.model
        return [
            [t.clone() for t in (*model.parameters(), *model.buffers())],
            [m.training for m in model.modules()],
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            [p.grad is None for p in model.parameters()],
        ]

    return state


@pytest.mark.parametrize("name", MODELS)
def test_probes_leave_no_trace(name: str) -> None:
    subject = Subject(name, by_domain=True)
    state = trace_of(subject)
    before = state()
    for _ in range(2):
        subject.probes.run(ALL)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert torch.equal(before[2], after[2])
    assert before[1] == after[1]
    assert before[3:] == after[3:]
    torch.rand(1)
    assert not torch.equal(before[2], state()[2]), "the twin: one number drawn must be seen"


def test_what_is_not_due_is_not_measured() -> None:
    subject = Subject("reference")
    runs: list[int] = []
    subject.model.register_forward_hook(lambda *_: runs.append(1))
    subject.model.embed.register_forward_hook(lambda *_: runs.append(2))
    assert subject.probes.run(frozenset()) == {}
    assert set(subject.probes.run(frozenset({"layers.spectral_norm_up"}))) >= {
        "layers.spectral_norm_up"
    }
    assert runs == []
    assert set(subject.probes.run(frozenset({"layers.curvature"}))) == {
        "layers.curvature",
        "layers.curvature_max",
        "experts.curvature",
    }
    assert runs == [2], "one forward, which ends before the head"


def test_layers_that_are_not_watched_cost_nothing_and_have_no_value() -> None:
    subject = Subject("reference", watched=(1,))
    subject.probes.run(ALL)
    subject.train()
    values = subject.probes.run(ALL)
    for key in (
        "layers.flip_rate",
        "layers.tear",
        "layers.curvature",
        "layers.spectral_norm_up",
        "layers.perturbation_growth",
    ):
        assert values[key].isnan().tolist() == [True, False, True], key


def test_curvature_alone_does_not_make_yesterdays_choice_todays() -> None:
    subject = Subject("reference")
    subject.probes.run(frozenset({"layers.flip_rate"}))
    then = subject.choices()
    subject.train()
    subject.probes.run(frozenset({"layers.curvature"}))
    subject.train()
    got = subject.probes.run(frozenset({"layers.flip_rate"}))["layers.flip_rate"]
    now = subject.choices()
    expected = [
        slow.flip_rate(n[1].tolist(), t[1].tolist()) for n, t in zip(now, then, strict=True)
    ]
    assert got.tolist() == pytest.approx(expected)
    subject.probes.forget()
    assert "layers.flip_rate" not in subject.probes.run(frozenset({"layers.flip_rate"}))


def test_a_place_that_cannot_be_watched_is_said_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    subject = Subject("reference")
    subject.probes.remove()
    monkeypatch.setattr("geodiag.hooks.adapters.reference.rotate", lambda *_: 1 / 0)
    probes = Probes(
        subject.model,
        find_layout(subject.model),
        FailureGuard(lambda what, _e: said.append(what)),
        batch=subject.batch,
    )
    monkeypatch.undo()
    monkeypatch.setattr("geodiag.hooks.adapters.reference.rotate", lambda *_: 1 / 0)
    for _ in range(2):
        assert "layers.curvature" in probes.run(ALL)
    assert said == [f"probe of attention {i}" for i in range(3)]


def test_hooks_come_off() -> None:
    def hooks(model: Any) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    for name in MODELS:
        subject = Subject(name, by_domain=True)
        assert hooks(subject.model) > 20
        subject.probes.remove()
        assert hooks(subject.model) == 0
        if name == "deepseek_v4":
            assert all("_apply_gate" not in moe.experts.__dict__ for moe in subject.moes)
