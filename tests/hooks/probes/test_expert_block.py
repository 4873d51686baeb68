"""The expert block as a function, and what is told by it: curvature and tear, against their
definitions in float64.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from geodiag.hooks.adapters import find_layout
from geodiag.hooks.probes import expert_block as block
from geodiag.hooks.probes.curvature import EPSILON, curvature, directions
from geodiag.hooks.probes.expert_block import expert_block, full_precision, gates
from geodiag.hooks.probes.tear import TOKENS, FlippedTokens, pick_flipped, tear
from tests.hooks import small
from tests.hooks.adapters import tiny_v4

MODELS = ("reference", "deepseek_v4")


def made(name: str) -> tuple[Any, Any, Any, int]:
    """Model, layout, the module of its layer 1's expert block, and its width; weights large enough
    to bend.
    """
    model = small.trainer(swiglu_limit=0.3).model if name == "reference" else tiny_v4.model()
    moe = model.blocks[1].moe if name == "reference" else model.model.layers[1].mlp
    for p in moe.parameters():
        p.data.mul_(20.0)
    return model, find_layout(model), moe, 16 if name == "reference" else 32


def tokens(width: int, count: int = 10, seed: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def choice(name: str, moe: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if name == "reference":
        routing = moe.router(x, torch.zeros(len(x), dtype=torch.int64))
        return routing.expert_ids_TK, routing.weights_TK
    _, weights, ids = moe.gate(x)
    return ids, weights


def slow_block(name: str, moe: Any, x_TC: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The block written out in float64, a token and an expert at a time, from the module's own
    weights.
    """
    limit = 0.3 if name == "reference" else tiny_v4.LIMIT

    def glu(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    out = []
    for x, chosen, weigh in zip(x_TC.double(), ids, weights.double(), strict=True):
        if name == "reference":
            routed = [
                (moe.experts.gate_up[e].double().T, moe.experts.down[e].double().T) for e in chosen
            ]
            own = (moe.shared.gate_up.weight.double(), moe.shared.down.weight.double())
        else:
            routed = [
                (moe.experts.gate_up_proj[e].double(), moe.experts.down_proj[e].double())
                for e in chosen
            ]
            s = moe.shared_experts
            own = (
                torch.cat([s.gate_proj.weight, s.up_proj.weight]).double(),
                s.down_proj.weight.double(),
            )
        y = own[1] @ glu(*(own[0] @ x).chunk(2))
        for w, (gate_up, down) in zip(weigh, routed, strict=True):
            y = y + w * (down @ glu(*(gate_up @ x).chunk(2)))
        out.append(y)
    return torch.stack(out).detach()


@pytest.mark.parametrize("name", MODELS)
def test_the_block_as_a_function_is_the_models_own_block(name: str) -> None:
    _, layout, moe, width = made(name)
    x = tokens(width)
    ids, weights = choice(name, moe, x)
    got = expert_block(layout.experts[1], x, gates(ids, weights, layout.experts[1].experts)[None])[
        0
    ]
    ids_BS = torch.zeros(1, len(x), dtype=torch.int64)
    own = moe(x[None], ids_BS).hidden_BSC[0] if name == "reference" else moe(x[None])[0]
    torch.testing.assert_close(got, own.detach(), rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(
        got.double(), slow_block(name, moe, x, ids, weights), rtol=2e-4, atol=1e-6
    )
    other = expert_block(
        layout.experts[1], x, gates(ids.roll(1, 0), weights, layout.experts[1].experts)[None]
    )[0]
    assert ((other - own).norm() / own.norm()).item() > 1e-2, (
        "the twin: another choice must be seen"
    )


def test_taking_the_experts_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layout, _moe, width = made("reference")
    x = tokens(width).double()
    dense = torch.rand(2, len(x), 4, dtype=torch.float64)
    whole = expert_block(layout.experts[1], x, dense)
    monkeypatch.setattr(block, "_AT_ONCE", 1)
    torch.testing.assert_close(
        expert_block(layout.experts[1], x, dense), whole, rtol=1e-12, atol=1e-12
    )
    assert whole.dtype == torch.float64


def test_full_precision_is_lent_and_given_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def slow_curvature(
    name: str, moe: Any, x: Tensor, ids: Tensor, weights: Tensor, v: Tensor
) -> Tensor:
    step = EPSILON * x.double().norm(dim=-1, keepdim=True) * v.double()
    there, here, back = (
        slow_block(name, moe, x.double() + s, ids, weights) for s in (step, 0 * step, -step)
    )
    return (there - 2 * here + back).norm(dim=-1) / (there - back).norm(dim=-1)


@pytest.mark.parametrize("name", MODELS)
def test_curvature_is_the_central_difference_with_the_routing_held(name: str) -> None:
    _, layout, moe, width = made(name)
    x, site = tokens(width), layout.experts[1]
    ids, weights = choice(name, moe, x)
    v = directions(len(x), width, x.device)
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(len(x)))
    expected = slow_curvature(name, moe, x, ids, weights, v)
    exact = curvature(site, x.double(), gates(ids, weights, site.experts), v)
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-7)
    rounded = curvature(site, x, gates(ids, weights, site.experts), v)
    torch.testing.assert_close(rounded.double(), expected, rtol=5e-2, atol=1e-4)
    twin = slow_curvature(name, moe, x, ids, weights, v.flip(0))
    assert ((twin - expected).abs() / expected).max().item() > 0.05, (
        "the twin: other directions must be seen"
    )


def test_a_block_that_does_not_bend_has_no_curvature() -> None:
    """Without clamp and far to the right, SiLU is the identity; of gate and up only one may move
    with x.
    """
    _, layout, _, width = made("reference")
    site = layout.experts[1]
    flat = type(site)(**(site.__dict__ | {"activation": lambda gate, up: up}))
    x = tokens(width).double()
    dense = gates(torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1), 4)
    v = directions(len(x), width, x.device)
    assert curvature(flat, x, dense, v).max().item() < 1e-10
    assert curvature(site, x, dense, v).max().item() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_tear_is_the_relative_jump_over_all_tokens_and_over_the_flipped(name: str) -> None:
    _, layout, moe, width = made(name)
    x, site = tokens(width), layout.experts[1]
    ids, weights = choice(name, moe, x)
    then = ids.clone()
    then[2:6, 0] = torch.tensor(
        [next(e for e in range(site.experts) if e not in row) for row in ids[2:6].tolist()]
    )
    flipped = (then != ids).any(-1)
    where = pick_flipped(flipped)
    got = tear(
        site,
        FlippedTokens(
            x[where],
            gates(ids, weights, site.experts)[where],
            gates(then, weights, site.experts)[where],
            flipped[where],
            flipped.float().mean(),
        ),
    )
    now, before = slow_block(name, moe, x, ids, weights), slow_block(name, moe, x, then, weights)
    jump = (now - before).norm(dim=-1) / now.norm(dim=-1)
    assert got[0].item() == pytest.approx(jump.mean().item(), rel=1e-3)
    assert got[1].item() == pytest.approx(jump[2:6].mean().item(), rel=1e-3)
    assert got[0].item() != pytest.approx(got[1].item(), rel=0.1), (
        "the twin: over all is not over the flipped"
    )


def test_without_a_flip_the_tear_is_exactly_0_and_the_flipped_have_none() -> None:
    _, layout, _, width = made("reference")
    x = tokens(width)
    dense = torch.rand(len(x), 4)
    got = tear(
        layout.experts[1],
        FlippedTokens(x, dense, dense, torch.zeros(len(x), dtype=torch.bool), torch.zeros(())),
    )
    assert got[0].item() == 0
    assert got[1].isnan()


def test_flipped_tokens_are_picked_first() -> None:
    flipped = torch.zeros(500, dtype=torch.bool)
    flipped[torch.randperm(500, generator=torch.Generator().manual_seed(0))[: TOKENS - 10]] = True
    assert flipped[pick_flipped(flipped)].sum() == TOKENS - 10
    assert flipped[pick_flipped(torch.ones(500, dtype=torch.bool))].sum() < TOKENS - 10, (
        "the twin: picked blindly"
    )
