"""Formulas of the metrics: tensors in, tensors out, nothing is read on the host.

Definitions: docs/metrics.md. `res_TNN` is the operator on the streams: x' = res @ x.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# T tokens, S sites, N streams, E experts, K experts per token, A assignments, F expert dim


class Gains(NamedTuple):
    """Per token: largest and smallest |row sum| (forward) and |column sum| (backward) of a map."""

    fwd_T: Tensor
    fwd_min_T: Tensor
    bwd_T: Tensor
    bwd_min_T: Tensor


@torch.no_grad()
def amax_gains(res_TNN: Tensor) -> Gains:
    """Return the gains of each map (arXiv 2512.24880 §3.1).

    max_i |Σ_j H[i, j]| forward, max_j |Σ_i H[i, j]| backward. The magnitude is taken of the sum, so
    for a map with negative entries this is smaller than the ∞-norm.
    """
    rows, columns = res_TNN.sum(-1).abs(), res_TNN.sum(-2).abs()
    return Gains(rows.amax(-1), rows.amin(-1), columns.amax(-1), columns.amin(-1))


@torch.no_grad()
def sinkhorn_residual(res_TNN: Tensor) -> Tensor:
    """Return the largest distance of a row or column sum from 1, per token."""
    rows, columns = (res_TNN.sum(-1) - 1).abs(), (res_TNN.sum(-2) - 1).abs()
    return torch.maximum(rows.amax(-1), columns.amax(-1))


@torch.no_grad()
def composite_gains(res_STNN: Tensor) -> Gains:
    """Return the gains of the composites at every site, (S, T) each.

    Forward of P_s = H_s … H_1 and backward of Q_s = H_S … H_s, in the order of the sites. Row sums
    of a product are the product applied to ones, H_s (… (H_1 1)): a vector a token is enough.
    """
    sites, tokens, n, _ = res_STNN.shape
    rows = torch.ones(tokens, n, device=res_STNN.device, dtype=res_STNN.dtype)
    columns = torch.ones_like(rows)
    forward, backward = [], []
    for s in range(sites):
        rows = (res_STNN[s] * rows.unsqueeze(-2)).sum(-1)
        forward.append(rows)
    for s in reversed(range(sites)):
        columns = (res_STNN[s] * columns.unsqueeze(-1)).sum(-2)
        backward.append(columns)
    f, b = torch.stack(forward).abs(), torch.stack(backward[::-1]).abs()
    return Gains(f.amax(-1), f.amin(-1), b.amax(-1), b.amin(-1))


SQUARINGS = 10
"""Squarings of HᵀH in `spectral_norm`, so m = 1024 power iterations."""


@torch.no_grad()
def spectral_norm(maps: Tensor) -> Tensor:
    """Return the spectral norm ‖H‖₂ of each small map (…, N, N).

    Power iteration on G = HᵀH by repeated squaring, then the Rayleigh quotient of the heaviest
    column of Gᵐ. The result is low by at most N / (4e·m) of ‖H‖₂, m = 1024, however close the
    singular values are: less than 1e-3 up to N = 8 (4e-4 for N = 4, 7e-4 for N = 8).
    """
    # Why: the heaviest column has a square of at least λ₁²ᵐ/N, so an eigenvalue r·λ₁ lowers the
    # quotient by at most N·r²ᵐ(1 − r) ≤ N / (2e·m), and its root by half of that.
    # Tokens last, products by broadcasting: thousands of 4×4 matrices are no work for a matmul
    # library.
    h = maps.flatten(0, -3).permute(1, 2, 0).contiguous()
    gram = _times(h.transpose(0, 1), h)
    power = gram
    for _ in range(SQUARINGS):
        # By the trace, the sum of the eigenvalues: then λ₁ is between 1/N and 1.
        trace = power.diagonal(dim1=0, dim2=1).sum(-1).clamp_min(1e-30)
        power = power / trace
        power = _times(power, power)
    column = power.square().sum(0).argmax(0)
    v = power.gather(1, column.expand(len(power), 1, -1)).squeeze(1)
    value = (v * (gram * v).sum(1)).sum(0) / v.square().sum(0).clamp_min(1e-30)
    return value.clamp_min(0).sqrt().add(0 * h.sum((0, 1))).view(maps.shape[:-2])


def _times(a_NNT: Tensor, b_NNT: Tensor) -> Tensor:
    return (a_NNT.unsqueeze(2) * b_NNT.unsqueeze(0)).sum(1)


@torch.no_grad()
def post_concentration(post_TN: Tensor) -> Tensor:
    """Return the mean over tokens of max_i H_post / mean_i H_post, in [1, N]."""
    return (post_TN.amax(-1) / post_TN.mean(-1)).mean()


class ClampHits(NamedTuple):
    """Numbers of elements in each row of pre-activations that a limit clamps."""

    gate_A: Tensor
    up_high_A: Tensor
    up_low_A: Tensor


@torch.no_grad()
def clamp_hits(gate_AF: Tensor, up_AF: Tensor, gate_limit: float, up_limit: float) -> ClampHits:
    """Count the elements strictly beyond the limits. A value on the limit is not clamped."""
    return ClampHits(
        (gate_AF > gate_limit).sum(-1, dtype=torch.float32),
        (up_AF > up_limit).sum(-1, dtype=torch.float32),
        (up_AF < -up_limit).sum(-1, dtype=torch.float32),
    )


@torch.no_grad()
def by_expert(values_A: Tensor, expert_A: Tensor, experts: int, reduce: str = "sum") -> Tensor:
    """Return the sum (or "amax") over each expert's rows; 0 for an expert without rows."""
    start = torch.zeros(experts, device=values_A.device)
    return start.scatter_reduce(
        0, expert_A.long(), values_A.float(), reduce, include_self=reduce == "sum"
    )


@torch.no_grad()
def over_median(values_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest value over the median; NaN: an expert without tokens."""
    median = values_E.nanquantile(0.5, dim=-1)
    high = torch.where(values_E.isnan(), -torch.inf, values_E).amax(-1)
    low = torch.where(values_E.isnan(), torch.inf, values_E).amin(-1)
    return high / median, low / median


@torch.no_grad()
def flips(now_TK: Tensor, then_TK: Tensor) -> Tensor:
    """Return 1 − |A ∩ B| / K of each token: the share of its experts that changed, in any order."""
    same = (now_TK.unsqueeze(-1) == then_TK.unsqueeze(-2)).any(-1)
    return 1 - same.float().mean(-1)


@torch.no_grad()
def first_choice(expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return each token's expert with the largest gate weight."""
    return expert_ids_TK.gather(-1, weights_TK.argmax(-1, keepdim=True)).squeeze(-1)


@torch.no_grad()
def jaccard(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """Return |A ∩ B| / |A ∪ B| of each token's two choices of K experts."""
    both = (a_TK.unsqueeze(-1) == b_TK.unsqueeze(-2)).any(-1).sum(-1).float()
    return both / (2 * a_TK.shape[-1] - both)


@torch.no_grad()
def margins(biased_TE: Tensor, k: int) -> Tensor:
    """Return the score of the last chosen expert minus that of the best rejected one, per token."""
    top = biased_TE.topk(k + 1, dim=-1).values
    return top[..., k - 1] - top[..., k]


@torch.no_grad()
def entropy(scores_TE: Tensor) -> Tensor:
    """Return −Σ p ln p of each token's normalised scores p, in nats."""
    p = scores_TE / scores_TE.sum(-1, keepdim=True)
    return -(p * p.clamp_min(1e-30).log()).sum(-1)


@torch.no_grad()
def max_vio(load_E: Tensor) -> Tensor:
    """Return max load / mean load − 1 (MaxVio, arXiv 2408.15664): 0 for a perfect balance."""
    return load_E.amax(-1) / load_E.mean(-1) - 1


@torch.no_grad()
def load_cv(load_E: Tensor) -> Tensor:
    """Return the standard deviation of the loads over their mean."""
    return load_E.std(-1, correction=0) / load_E.mean(-1)


@torch.no_grad()
def power_step(weight_ERC: Tensor, vector_EC: Tensor) -> tuple[Tensor, Tensor]:
    """Do one power iteration on each matrix: return ‖W v‖ for the unit vector v, and the next v.

    v ← Wᵀ(W v) / ‖Wᵀ(W v)‖ turns v towards the top right singular vector, and ‖W v‖ rises to ‖W‖₂.
    """
    # In the weights' own dtype: products accumulate in float32 anyway, and a float32 copy of all
    # experts would cost more than the products.
    u = (weight_ERC @ vector_EC.unsqueeze(-1).to(weight_ERC.dtype)).squeeze(-1).float()
    v = (weight_ERC.mT @ u.unsqueeze(-1).to(weight_ERC.dtype)).squeeze(-1).float()
    return u.norm(dim=-1), torch.nn.functional.normalize(v, dim=-1)


def in_order(layers: Sequence[int], values: Mapping[int, Tensor]) -> Tensor:
    """Return one row a layer; NaN for layers without a value."""
    nothing = torch.full_like(next(iter(values.values())), torch.nan, dtype=torch.float32)
    return torch.stack([values.get(i, nothing).float() for i in layers])
