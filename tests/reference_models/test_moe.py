"""Routing: the hash, the balance loss and the balancing bias, each against its definition."""

import pytest
import torch
from torch import Tensor

from geodiag.reference_models.config import ModelConfig, sized
from geodiag.reference_models.kernels.reference import Routing, affinity
from geodiag.reference_models.moe import (
    HashRouter,
    MoE,
    Router,
    loads,
    nudge_balance,
    sequence_balance_loss,
)
from tests.reference_models.close import error

E, K, TOLERANCE = 8, 2, 1e-5


def config(**changes) -> ModelConfig:
    return sized("tiny", experts=E, experts_per_token=K, **changes)


# -- the hash ------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "k", "vocab"), [(8, 2, 256), (64, 6, 5000), (72, 6, 5000)])
def test_hashed_tokens_spread_over_experts_and_differently_in_every_layer(
    experts: int, k: int, vocab: int
) -> None:
    shape = ModelConfig(vocab=vocab, experts=experts, experts_per_token=k)
    tables = [HashRouter(shape, layer).table for layer in range(3)]
    for table in tables:
        assert all(len(set(row)) == k for row in table.tolist())
        share = torch.bincount(table.flatten(), minlength=experts) * experts / table.numel()
        assert share.min() > 0.7
        assert share.max() < 1.3
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (tables[a] != tables[b]).any(1).float().mean() > 0.5
    neighbours = (tables[0][1:, 0] - tables[0][:-1, 0]) % experts
    assert len(neighbours.unique()) > 1, "a hash, not the id itself counted round"


def test_a_hash_layer_ignores_the_hidden_state_and_the_balancing_bias() -> None:
    torch.manual_seed(0)
    block = MoE(config(), layer=0)
    torch.nn.init.normal_(block.router.weight)
    ids = torch.randint(256, (2, 9))
    assert isinstance(block.router, HashRouter)
    a = block.router(torch.randn(18, 64), ids.flatten())
    block.router.balance += torch.randn(E)
    b = block.router(torch.randn(18, 64), ids.flatten())
    assert torch.equal(a.expert_ids_TK, b.expert_ids_TK)
    assert not torch.equal(a.weights_TK, b.weights_TK), "the affinities weigh"


# -- the sequence balance loss -------------------------------------------------------------


def slow_balance(scores_BSE: Tensor, k: int) -> float:
    """arXiv 2412.19437 eq. 17-20, summed term by term."""
    total, (sequences, tokens, experts) = 0.0, scores_BSE.shape
    for sequence in scores_BSE.double().tolist():
        for e in range(experts):
            chosen = sum(e in sorted(range(experts), key=lambda i: -s[i])[:k] for s in sequence)
            f = experts / (k * tokens) * chosen
            p = sum(s[e] / sum(s) for s in sequence) / tokens
            total += f * p
    return total / sequences


def routed(scores_TE: Tensor, ids_TK: Tensor | None = None) -> Routing:
    ids = scores_TE.topk(K).indices if ids_TK is None else ids_TK
    return Routing(scores_TE, ids, scores_TE.gather(-1, ids))


def test_the_balance_loss_is_its_definition() -> None:
    scores = torch.rand(3 * 11, E) ** 2
    ours = sequence_balance_loss(routed(scores), 3)
    assert ours.item() == pytest.approx(slow_balance(scores.view(3, 11, E), K), rel=1e-5)
    assert ours.item() != pytest.approx(slow_balance(scores.view(1, 33, E), K), rel=1e-3), (
        "within each sequence"
    )


def test_the_balance_loss_counts_the_best_scores_whatever_bias_or_replay_chose() -> None:
    scores = torch.rand(22, E)
    worst = (-scores).topk(K).indices
    assert torch.equal(
        sequence_balance_loss(routed(scores), 2), sequence_balance_loss(routed(scores, worst), 2)
    )


def test_the_balance_loss_is_one_when_even_and_more_when_not() -> None:
    even = (
        torch.stack(
            [torch.eye(E).roll(-t, 0)[0] + torch.eye(E).roll(-t - 1, 0)[0] for t in range(E)]
        )
        + 0.1
    )
    assert sequence_balance_loss(routed(even), 1).item() == pytest.approx(1.0, rel=1e-6)
    narrow = torch.full((E, E), 0.1)
    narrow[:, :K] = 1.1
    collapsed = sequence_balance_loss(routed(narrow), 1).item()
    assert collapsed == pytest.approx(E / K * 2.2 / (2.2 + 0.6), rel=1e-5), "all on K experts"


def test_following_the_balance_losss_gradient_evens_the_loads() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(256, 16), torch.randn(E, 16, requires_grad=True)
    weight.data[0] += 2 * hidden.mean(0) + 0.5
    start = loads(routed(affinity(hidden, weight))).std()
    optimizer = torch.optim.SGD([weight], lr=5.0)
    for _ in range(50):
        optimizer.zero_grad()
        sequence_balance_loss(routed(affinity(hidden, weight)), 4).backward()
        optimizer.step()
    assert loads(routed(affinity(hidden, weight))).std() < 0.6 * start


# -- the balancing bias --------------------------------------------------------------------


def lopsided() -> tuple[Router, Tensor]:
    """A router that sends nearly everything to two experts."""
    torch.manual_seed(0)
    router, hidden = Router(config()), torch.randn(512, 64) + 0.5
    torch.nn.init.normal_(router.weight, std=0.02)
    router.weight.data[:2] += 0.03
    return router, hidden


def test_the_bias_of_the_overloaded_falls_by_one_step_and_of_the_others_rises() -> None:
    router, _ = lopsided()
    nudge_balance(router, torch.tensor([10.0, 4, 4, 4, 4, 4, 1, 1]), 0.25)
    assert router.balance.tolist() == [-0.25, 0, 0, 0, 0, 0, 0.25, 0.25]


@pytest.mark.parametrize(("speed", "evens"), [(1e-2, True), (0.0, False), (-1e-2, False)])
def test_the_bias_evens_the_loads_without_touching_the_scores(speed: float, evens: bool) -> None:
    router, hidden = lopsided()
    ids = torch.zeros(512, dtype=torch.long)
    first = router(hidden, ids)
    for _ in range(100):
        nudge_balance(router, loads(router(hidden, ids)), speed)
    last = router(hidden, ids)
    assert loads(first).max() > 2 * 512 * K / E, "it must start uneven"
    assert (loads(last).max() < 1.35 * 512 * K / E) == evens
    assert torch.equal(first.scores_TE, last.scores_TE)


def test_loads_count_every_assignment() -> None:
    ids = torch.randint(E, (50, K))
    assert loads(Routing(torch.rand(50, E), ids, torch.rand(50, K))).tolist() == [
        float((ids == e).sum()) for e in range(E)
    ]


# -- the experts ---------------------------------------------------------------------------


def test_a_logit_far_below_zero_gives_a_finite_gradient() -> None:
    hidden, weight = torch.full((3, 4), 100.0, requires_grad=True), torch.full((E, 4), 0.1)
    weight[0] = -1.0
    weight.requires_grad_()
    scores = affinity(hidden, weight)
    scores.sum().backward()
    assert weight.grad is not None
    assert hidden.grad is not None
    assert weight.grad.isfinite().all()
    assert hidden.grad.isfinite().all()
    assert weight.grad[0].eq(0).all()
    bare = torch.tensor([-400.0], requires_grad=True)
    torch.nn.functional.softplus(bare).sqrt().backward()
    assert bare.grad is not None
    assert bare.grad.isnan(), "the bare formula's is not"


def test_the_block_is_each_tokens_weighted_experts_plus_the_shared_one() -> None:
    torch.manual_seed(0)
    block = MoE(config(), layer=1)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, ids = torch.randn(2, 6, 64), torch.zeros(2, 6, dtype=torch.long)
    out = block(x, ids)
    flat, slow = x.flatten(0, 1).double(), torch.zeros(12, 64, dtype=torch.float64)
    act = block.experts.act
    for t in range(12):
        for j in range(K):
            e = int(out.routing.expert_ids_TK[t, j])
            inner = act(flat[t] @ block.experts.gate_up[e].double()).out_AF
            slow[t] += out.routing.weights_TK[t, j].double() * (
                inner @ block.experts.down[e].double()
            )
        slow[t] += block.shared.double()(flat[t])
    assert error(out.hidden_BSC.flatten(0, 1), slow) < TOLERANCE
    assert error(out.hidden_BSC.flatten(0, 1), slow.roll(1, 0)) > 0.5


def test_an_unchosen_expert_gets_no_gradient_and_changes_nothing() -> None:
    torch.manual_seed(0)
    block = MoE(config(), layer=1)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    block.router.balance[3] = -100
    out = block(torch.randn(2, 6, 64), torch.zeros(2, 6, dtype=torch.long))
    out.hidden_BSC.square().sum().backward()
    assert loads(out.routing)[3] == 0
    grad = block.experts.gate_up.grad
    assert grad is not None
    assert not grad[3].any()
    assert all(grad[e].any() for e in range(E) if loads(out.routing)[e])
