"""Every metric function against its slow float64 definition, and against matrices whose answer is
known.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from geodiag.hooks.measure import formulas as metrics
from tests.hooks import slow

TOLERANCE = 1e-5


def close(a: Tensor | float, b: float) -> bool:
    a = a.item() if isinstance(a, Tensor) else a
    return abs(a - b) <= TOLERANCE * max(abs(b), 1e-3)


def signed(sites: int = 5, tokens: int = 7) -> Tensor:
    return torch.randn(sites, tokens, 4, 4, generator=torch.Generator().manual_seed(1))


def test_amax_gain_sums_with_sign_then_takes_the_magnitude() -> None:
    res = signed()[0]
    g, slow_res = metrics.amax_gains(res), res.double().numpy()
    assert close(g.fwd_T.mean(), slow.mean_amax_fwd(slow_res))
    assert close(g.bwd_T.mean(), slow.mean_amax_bwd(slow_res))
    assert close(g.fwd_min_T.mean(), slow.mean_gain_fwd_min(slow_res))
    infinity_norm = res.abs().sum(-1).amax(-1).mean()
    assert not close(infinity_norm, slow.mean_amax_fwd(slow_res)), (
        "for a signed map the ∞-norm is another number"
    )


def test_amax_gain_of_a_known_matrix_and_its_orientation() -> None:
    h = torch.tensor([[[1.0, 2.0], [0.0, -0.5]]])
    g = metrics.amax_gains(h)
    assert (g.fwd_T.item(), g.fwd_min_T.item()) == (3.0, 0.5)
    assert (g.bwd_T.item(), g.bwd_min_T.item()) == (1.5, 1.0)
    assert metrics.amax_gains(h.mT).fwd_T.item() != g.fwd_T.item()


def test_composite_gains_equal_the_products_multiplied_out() -> None:
    res = signed()
    g = metrics.composite_gains(res)
    p, q = slow.composites_fwd(res.double().numpy()), slow.composites_bwd(res.double().numpy())
    for s in range(len(res)):
        assert close(g.fwd_T[s].mean(), slow.mean_amax_fwd(p[s]))
        assert close(g.fwd_min_T[s].mean(), slow.mean_gain_fwd_min(p[s]))
        assert close(g.bwd_T[s].mean(), slow.mean_amax_bwd(q[s]))


def test_composites_in_the_wrong_order_would_be_seen() -> None:
    res = signed()
    right, wrong = metrics.composite_gains(res), metrics.composite_gains(res.flip(0))
    assert not close(wrong.fwd_T[-1].mean(), right.fwd_T[-1].mean().item())


def test_composite_of_doubly_stochastic_maps_is_one_everywhere() -> None:
    g = metrics.composite_gains(torch.full((9, 3, 4, 4), 0.25))
    assert torch.allclose(torch.stack(g), torch.ones(4, 9, 3))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_spectral_norm_agrees_with_the_singular_values(scale: float) -> None:
    res = signed(sites=3, tokens=200) * scale
    exact = torch.linalg.matrix_norm(res.double(), 2)
    error = (metrics.spectral_norm(res).double() - exact).abs() / exact
    assert error.max() < 1e-5
    assert error.median() < 1e-6


def test_spectral_norm_with_two_equal_singular_values() -> None:
    assert close(metrics.spectral_norm(torch.eye(4)[None]), 1.0)
    assert close(metrics.spectral_norm(torch.diag(torch.tensor([3.0, -3.0, 1.0, 0.0]))[None]), 3.0)


def test_spectral_norm_is_not_the_frobenius_norm_and_passes_nan_on() -> None:
    res = signed()[0]
    assert not close(res.norm(dim=(-2, -1)).mean(), torch.linalg.matrix_norm(res, 2).mean().item())
    res[0, 0, 0] = math.nan
    norms = metrics.spectral_norm(res)
    assert norms[0].isnan()
    assert not norms[1:].isnan().any()


def test_sinkhorn_residual_is_the_worst_of_both_sides() -> None:
    res = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(0))
    assert close(
        metrics.sinkhorn_residual(res).amax(), slow.sinkhorn_residual(res.double().numpy())
    )
    rows_exact = res / res.sum(-1, keepdim=True)
    assert metrics.sinkhorn_residual(rows_exact).amax() > 0.01, (
        "the side that is exact must not hide the other"
    )


def test_flips_do_not_depend_on_order() -> None:
    now, then = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[1, 0], [3, 7], [6, 7]])
    assert metrics.flips(now, then).tolist() == [0.0, 0.5, 1.0]
    assert close(metrics.flips(now, then).mean(), slow.flip_rate(now.tolist(), then.tolist()))
    assert close(
        (metrics.flips(now, then) > 0).float().mean(), slow.flip_any(now.tolist(), then.tolist())
    )
    assert (now != then).float().mean() != metrics.flips(now, then).mean(), (
        "comparing in place would count order"
    )


def test_first_choice_is_the_heaviest_whatever_the_order() -> None:
    ids, weights = torch.tensor([[4, 2], [2, 4]]), torch.tensor([[0.3, 0.7], [0.7, 0.3]])
    assert metrics.first_choice(ids, weights).tolist() == [2, 2]


def test_jaccard_counts_the_union() -> None:
    a, b = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 5], [3, 2]])
    assert close(metrics.jaccard(a, b).mean(), slow.jaccard(a.tolist(), b.tolist()))
    assert metrics.jaccard(a, b)[0].item() == pytest.approx(1 / 3)


def test_router_statistics_follow_their_definitions() -> None:
    scores = torch.rand(50, 8, generator=torch.Generator().manual_seed(2)) + 0.1
    exact = scores.double().numpy()
    np.testing.assert_allclose(
        metrics.margins(scores, 2).numpy(), slow.margins(exact, 2), rtol=1e-5, atol=1e-7
    )
    assert close(metrics.entropy(scores).mean(), slow.entropy(exact))
    load = torch.tensor([1.0, 5.0, 2.0, 0.0])
    assert close(metrics.max_vio(load), slow.max_vio(load.double().numpy()))
    assert close(metrics.load_cv(load), slow.load_cv(load.double().numpy()))
    assert metrics.max_vio(torch.ones(8)).item() == 0.0


def test_a_value_on_the_limit_is_not_clamped() -> None:
    gate = torch.tensor([[10.0, 10.1, -99.0]])
    up = torch.tensor([[10.0, -10.0, -10.1]])
    hits = metrics.clamp_hits(gate, up, 10.0, 10.0)
    assert [h.item() for h in hits] == [1.0, 0.0, 1.0]


def test_clamp_hits_follow_the_definition() -> None:
    gate, up = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(4))
    hits = metrics.clamp_hits(gate, up, 0.5, 0.8)
    exact = slow.clamp_rates(gate.double().numpy(), up.double().numpy() * 0.5 / 0.8, 0.5)
    for got, wanted in zip(hits, exact, strict=True):
        assert close(got.sum() / gate.numel(), wanted)


def test_expert_sums_and_an_expert_without_tokens() -> None:
    act = torch.randn(9, 5, generator=torch.Generator().manual_seed(5))
    expert = torch.tensor([0, 0, 1, 1, 1, 3, 3, 3, 3])
    square = metrics.by_expert(act.square().sum(-1), expert, 4)
    count = metrics.by_expert(torch.full((9,), 5.0), expert, 4)
    rms = (square / count).sqrt()
    exact = slow.expert_rms(act.double().numpy(), expert.tolist(), 4)
    assert exact[2] is None
    assert rms[2].isnan()
    for i in (0, 1, 3):
        assert close(rms[i], exact[i] or 0.0)
    assert (
        metrics.by_expert(act.abs().amax(-1), expert, 4, "amax")[1].item()
        == act[2:5].abs().max().item()
    )


def test_over_median_ignores_experts_without_tokens() -> None:
    rms = torch.tensor([[1.0, 2.0, 3.0, math.nan, 30.0]])
    high, low = metrics.over_median(rms)
    assert (high.item(), low.item()) == pytest.approx((30.0 / 2.5, 1.0 / 2.5))


def test_power_iteration_that_is_never_restarted_finds_the_top_singular_value() -> None:
    weight = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(6))
    vector = torch.nn.functional.normalize(torch.ones(3, 12), dim=-1)
    first, vector = metrics.power_step(weight, vector)
    for _ in range(600):
        norm, vector = metrics.power_step(weight, vector)
    exact = torch.linalg.matrix_norm(weight.double(), 2)
    assert ((norm - exact).abs() / exact).max() < 1e-3
    assert ((first - exact).abs() / exact).max() > 1e-2, (
        "one step alone is not enough, or this test proves nothing"
    )
