"""The reference model against transformers' DeepSeek-V4: same weights in, same outputs and
gradients out.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from geodiag.reference_models.config import ModelConfig
from geodiag.reference_models.kernels import reference
from geodiag.reference_models.mhc import HyperConnection, ReadOut, Write
from geodiag.reference_models.moe import Experts, HashRouter, Router, SharedExpert

N, C, E, K, F, V = 4, 32, 8, 2, 24, 50
TOLERANCE = 1e-5


@pytest.fixture
def theirs() -> DeepseekV4Config:
    config = DeepseekV4Config(
        vocab_size=V,
        hidden_size=C,
        moe_intermediate_size=F,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        q_lora_rank=16,
        num_experts_per_tok=K,
        n_routed_experts=E,
        hc_mult=N,
        swiglu_limit=0.7,
        o_groups=1,
        o_lora_rank=16,
    )
    config._experts_implementation = "eager"
    return config


@pytest.fixture
def ours() -> ModelConfig:
    return ModelConfig(
        vocab=V,
        channels=C,
        experts=E,
        experts_per_token=K,
        expert_dim=F,
        streams=N,
        swiglu_limit=0.7,
        sequence=16,
    )


def error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64; NaN counts as infinitely wrong."""
    a, b = a.detach().double(), b.detach().double()
    e = ((a - b).norm() / b.norm()).item()
    return e if e == e else float("inf")


def grads(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients under random upstream gradients, the same ones at every call."""
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(o.shape, generator=generator) for o in outputs]
    return list(torch.autograd.grad(outputs, inputs, upstream))


def randomise(module: torch.nn.Module, std: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * std


def to_comb(res: Tensor) -> Tensor:
    """Entries of a row-major H_res in the order of transformers' transposed `comb`, along the first
    dimension.
    """
    return res.view(N, N, *res.shape[1:]).transpose(0, 1).reshape(res.shape)


def as_theirs(phi_or_bias: Tensor) -> Tensor:
    """Our columns pre | post | res as their rows pre | post | comb."""
    rows = phi_or_bias.T if phi_or_bias.dim() == 2 else phi_or_bias
    return torch.cat([rows[: 2 * N], to_comb(rows[2 * N :])])


def hyper_connections(
    theirs: DeepseekV4Config, ours: ModelConfig
) -> tuple[HyperConnection, torch.nn.Module]:
    mine, other = HyperConnection(ours, site=0), hf.DeepseekV4HyperConnection(theirs)
    randomise(mine)
    other.fn.data = as_theirs(mine.phi.data).clone()
    other.base.data = as_theirs(mine.bias.data).clone()
    other.scale.data = mine.alpha.data.clone()
    return mine, other


def site_ours(mine: HyperConnection, x: Tensor, f: Tensor) -> list[Tensor]:
    mix = mine(x)
    return [mix.inner_TC, mix.post_TN, mix.res_TNN, Write()(x, f, mix).streams_TNC]


def site_theirs(other: torch.nn.Module, x: Tensor, f: Tensor) -> list[Tensor]:
    post, comb, inner = other(x)
    out = post.unsqueeze(-1) * f.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)
    return [inner, post, comb.transpose(-1, -2), out]


def test_hyper_connection_outputs_and_gradients_agree(
    theirs: DeepseekV4Config, ours: ModelConfig
) -> None:
    mine, other = hyper_connections(theirs, ours)
    x, f = torch.randn(2, 5, N, C, requires_grad=True), torch.randn(2, 5, C, requires_grad=True)
    a, b = site_ours(mine, x, f), site_theirs(other, x, f)
    assert max(map(error, a, b)) < TOLERANCE
    ours_g = grads(a, [x, f, mine.phi, mine.bias, mine.alpha])
    theirs_g = grads(b, [x, f, other.fn, other.base, other.scale])
    ours_g[2], ours_g[3] = as_theirs(ours_g[2]), as_theirs(ours_g[3])
    assert max(map(error, ours_g, theirs_g)) < TOLERANCE


def test_a_transposed_residual_map_would_be_seen(
    theirs: DeepseekV4Config, ours: ModelConfig
) -> None:
    """The twin: with the orientation mixed up, the same comparison is far off."""
    mine, other = hyper_connections(theirs, ours)
    x, f = torch.randn(2, 5, N, C), torch.randn(2, 5, C)
    mix = mine(x)
    wrong = Write()(x, f, mix._replace(res_TNN=mix.res_TNN.mT)).streams_TNC
    assert error(wrong, site_theirs(other, x, f)[-1]) > 100 * TOLERANCE


def test_read_out_agrees(theirs: DeepseekV4Config, ours: ModelConfig) -> None:
    mine, other = ReadOut(ours), hf.DeepseekV4HyperHead(theirs)
    randomise(mine)
    other.hc_fn.data, other.hc_base.data = mine.phi.data.T.clone(), mine.bias.data.clone()
    other.hc_scale.data = mine.alpha.data.clone()
    x = torch.randn(2, 5, N, C, requires_grad=True)
    a, b = mine(x), other(x)
    assert error(a, b) < TOLERANCE
    ours_g, theirs_g = (
        grads([a], [x, mine.phi, mine.bias]),
        grads([b], [x, other.hc_fn, other.hc_base]),
    )
    ours_g[1] = ours_g[1].T
    assert max(map(error, ours_g, theirs_g)) < TOLERANCE


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    """Gate weights by expert, independent of the order in which a router lists its choice."""
    return torch.zeros(len(ids), E).scatter(1, ids, weights)


def routers(
    theirs: DeepseekV4Config, mine: Router, kind: Callable[..., torch.nn.Module]
) -> torch.nn.Module:
    randomise(mine)
    other = kind(theirs)
    other.weight.data = mine.weight.data.clone()
    mine.scale = theirs.routed_scaling_factor
    return other


def test_router_chooses_and_weighs_alike(theirs: DeepseekV4Config, ours: ModelConfig) -> None:
    mine = Router(ours)
    other = routers(theirs, mine, hf.DeepseekV4TopKRouter)
    mine.balance.copy_(torch.randn(E))
    other.e_score_correction_bias.copy_(mine.balance)
    x = torch.randn(40, C, requires_grad=True)
    a = mine(x, torch.zeros(40, dtype=torch.long))
    _, weights, ids = other(x)
    assert torch.equal(a.expert_ids_TK.sort().values, ids.sort().values)
    mine_dense, their_dense = dense(a.expert_ids_TK, a.weights_TK), dense(ids, weights)
    assert error(mine_dense, their_dense) < TOLERANCE
    assert (
        max(
            map(
                error,
                grads([mine_dense], [x, mine.weight]),
                grads([their_dense], [x, other.weight]),
            )
        )
        < TOLERANCE
    )


def test_the_bias_takes_part_in_choosing_only(ours: ModelConfig) -> None:
    """The twin: with the bias left in the weights, the router would differ from the oracle."""
    mine = Router(ours)
    randomise(mine)
    mine.balance.copy_(torch.randn(E))
    scores = reference.affinity(torch.randn(40, C), mine.weight)
    ids = reference.choose(scores, mine.balance, K)
    right, wrong = (
        reference.weigh(scores, ids, 1.0),
        reference.weigh(scores + mine.balance, ids, 1.0),
    )
    assert error(wrong, right) > 100 * TOLERANCE


def test_hash_router_weighs_alike_given_the_same_table(
    theirs: DeepseekV4Config, ours: ModelConfig
) -> None:
    mine = HashRouter(ours, layer=0)
    other = routers(theirs, mine, hf.DeepseekV4HashRouter)
    other.tid2eid.copy_(mine.table)
    x, tokens = torch.randn(40, C, requires_grad=True), torch.randint(V, (40,))
    a = mine(x, tokens)
    _, weights, ids = other(x, tokens)
    assert torch.equal(a.expert_ids_TK, ids)
    assert error(a.weights_TK, weights) < TOLERANCE
    assert (
        max(
            map(error, grads([a.weights_TK], [x, mine.weight]), grads([weights], [x, other.weight]))
        )
        < TOLERANCE
    )


def test_hash_router_gives_every_token_distinct_experts(ours: ModelConfig) -> None:
    table = HashRouter(ours, layer=0).table
    assert all(len(set(row)) == K for row in table.tolist())
    assert len(table.unique()) == E


def experts(theirs: DeepseekV4Config, ours: ModelConfig) -> tuple[Experts, torch.nn.Module]:
    mine, other = Experts(ours), hf.DeepseekV4Experts(theirs)
    randomise(mine)
    other.gate_up_proj.data = mine.gate_up.data.mT.clone()
    other.down_proj.data = mine.down.data.mT.clone()
    return mine, other


def choice() -> reference.Routing:
    scores = torch.rand(40, E)
    ids = scores.topk(K).indices
    return reference.Routing(scores, ids, torch.rand(40, K))


def test_clamped_experts_agree_where_clamps_bite(
    theirs: DeepseekV4Config, ours: ModelConfig
) -> None:
    mine, other = experts(theirs, ours)
    routing = choice()
    x, w = torch.randn(40, C, requires_grad=True), routing.weights_TK.requires_grad_()
    gate_up = x[:4] @ mine.gate_up[0]
    assert (gate_up > 0.7).any(), "the case must reach the clamp"
    a, b = mine(x, routing), other(x, routing.expert_ids_TK, w)
    assert error(a, b) < TOLERANCE
    ours_g = grads([a], [x, w, mine.gate_up, mine.down])
    theirs_g = grads([b], [x, w, other.gate_up_proj, other.down_proj])
    ours_g[2], ours_g[3] = ours_g[2].mT, ours_g[3].mT
    assert max(map(error, ours_g, theirs_g)) < TOLERANCE


def test_unclamped_experts_would_be_seen(theirs: DeepseekV4Config, ours: ModelConfig) -> None:
    """The twin: without the clamp the same comparison is far off."""
    mine, other = experts(theirs, ours)
    mine.act.limit = None
    routing = choice()
    x = torch.randn(40, C)
    assert (
        error(mine(x, routing), other(x, routing.expert_ids_TK, routing.weights_TK))
        > 100 * TOLERANCE
    )


def test_shared_expert_is_clamped_too(theirs: DeepseekV4Config, ours: ModelConfig) -> None:
    mine, other = SharedExpert(ours), hf.DeepseekV4MLP(theirs)
    randomise(mine)
    gate, up = mine.gate_up.weight.data.chunk(2)
    other.gate_proj.weight.data, other.up_proj.weight.data = gate.clone(), up.clone()
    other.down_proj.weight.data = mine.down.weight.data.clone()
    x = torch.randn(40, C, requires_grad=True)
    a, b = mine(x), other(x)
    assert error(a, b) < TOLERANCE
    assert error(*(grads([y], [x])[0] for y in (a, b))) < TOLERANCE
