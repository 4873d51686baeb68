"""Three implementations of the spectral norm against singular values in float64, with near-ties."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from geodiag.hooks.measure import composite_gains_kernel, formulas
from geodiag.hooks.measure.composite_gains import launch
from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.device import mhc_stats

# T maps, N streams

MAPS = 128
EPSILON = 1e-6
"""Of float32's rounding, beside the algorithm's own error."""


def bound(n: int) -> float:
    return n / (4 * math.e * 2**10) + EPSILON


def spread(count: int) -> Tensor:
    """Numbers between 1e-7 and 1, evenly in their logarithm."""
    return 10 ** -torch.linspace(0, 7, count).view(-1, 1, 1)


def general(n: int) -> Tensor:
    return torch.randn(MAPS, n, n)


def doubly_stochastic(n: int) -> Tensor:
    return reference.sinkhorn(6 * torch.randn(MAPS, n, n))


def near_permutations(n: int) -> Tensor:
    permutations = torch.eye(n)[torch.stack([torch.randperm(n) for _ in range(MAPS)])]
    share = spread(MAPS)
    return (1 - share) * permutations + share * doubly_stochastic(n)


def near_ties(n: int) -> Tensor:
    """Singular values 1 and 1 - δ for every δ, in random directions."""
    left, right = torch.linalg.qr(torch.randn(2, MAPS, n, n, dtype=torch.float64))[0]
    values = 1 - spread(MAPS).double().squeeze(-1) * torch.linspace(0, 1, n).clamp_min(0.5)
    values[:, 0] = 1
    return (left * values.unsqueeze(-2) @ right.mT).float()


FAMILIES = {f.__name__: f for f in (general, doubly_stochastic, near_permutations, near_ties)}


@triton.jit
def _norms(maps_ptr, out_ptr, N: tl.constexpr, BT: tl.constexpr):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.arange(0, N)
    offsets = (t[:, None] * N + n[None, :])[:, :, None] * N + n[None, None, :]
    tl.store(out_ptr + t, mhc_stats.spectral_norm(tl.load(maps_ptr + offsets), N))


def by_the_statistics_kernel(maps: Tensor) -> Tensor:
    out = torch.empty(len(maps), device=maps.device)
    _norms[(len(maps) // 64,)](maps, out, N=maps.shape[-1], BT=64)
    return out


def by_the_composites_kernel(maps: Tensor) -> Tensor:
    return launch(maps[None])[4, 0]


IMPLEMENTATIONS = {
    "torch": formulas.spectral_norm,
    "statistics kernel": by_the_statistics_kernel,
    "composites kernel": by_the_composites_kernel,
}


def furthest(norms: Tensor, maps: Tensor) -> float:
    """The largest relative error."""
    exact = torch.linalg.matrix_norm(maps.double(), 2)
    return float(((norms.double() - exact).abs() / exact).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_error_is_within_the_stated_bound(device, n, family, implementation):
    maps = FAMILIES[family](n).to(device)
    assert furthest(IMPLEMENTATIONS[implementation](maps), maps) < bound(n)


@pytest.mark.parametrize("family", ["doubly_stochastic", "near_permutations", "near_ties"])
def test_fewer_squarings_are_over_the_bound(monkeypatch, family):
    monkeypatch.setattr(formulas, "SQUARINGS", 5)
    maps = FAMILIES[family](4)
    assert furthest(formulas.spectral_norm(maps), maps) > 3 * bound(4)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_no_implementation_is_above_the_norm(device, n):
    maps = near_permutations(n).to(device)
    exact = torch.linalg.matrix_norm(maps.double(), 2)
    for norms in (f(maps) for f in IMPLEMENTATIONS.values()):
        assert float((norms.double() / exact).max()) < 1 + EPSILON


def test_all_implementations_agree_and_a_nan_stays_in_its_map(device):
    maps = general(4).to(device)
    maps[5, 1, 2] = torch.nan
    ours, *others = (f(maps) for f in IMPLEMENTATIONS.values())
    assert ours.isnan().nonzero().tolist() == [[5]]
    for norms in others:
        torch.testing.assert_close(norms, ours, rtol=1e-6, atol=0, equal_nan=True)


def test_all_implementations_have_the_same_number_of_squarings():
    assert mhc_stats.SQUARINGS.value == formulas.SQUARINGS
    assert composite_gains_kernel.SQUARINGS.value == formulas.SQUARINGS
