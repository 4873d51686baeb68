"""The geometry of the maps and of the streams, from values the mHC kernels already hold in
registers.

Kernels write one row of partial results a program, only while a device-side flag is set;
`summarise_maps` and
`summarise_streams` turn any number of sites' rows into the metrics' values, in a fixed order,
without a sync.
"""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from geodiag.reference_models.kernels.launch import cdiv

# T tokens, N streams, P programs, S sites

BLOCK = 8
"""Tokens of one map program of the `mix` kernel, so of one row of its statistics."""
SUMS = (
    "amax_gain_fwd",
    "amax_gain_bwd",
    "gain_fwd_min",
    "gain_bwd_min",
    "spectral_norm_res",
    "post_concentration",
)
MAXES = (
    "amax_gain_fwd_max",
    "amax_gain_bwd_max",
    "spectral_norm_res_max",
    "sinkhorn_residual",
    "res_logit_max",
)
STREAM_FIELDS = ("amax", "after", "branch", "mixed", "before")
WIDTH = 16
"""Floats of one row of the maps' statistics: sums, maxima, minus the least logit, the worst token.
"""


def maps_shape(tokens: int) -> tuple[int, int]:
    return cdiv(tokens, BLOCK), WIDTH


def streams_shape(tokens: int, blocks: int) -> tuple[int, int, int]:
    return tokens, blocks, len(STREAM_FIELDS)


@triton.jit
def _worst(value, live):
    """The largest live value; NaN where any is, because `tl.max` would pass over it."""
    return tl.max(tl.where(live, value, float("-inf")), 0) + 0.0 * tl.sum(
        tl.where(live, value, 0.0), 0
    )


@triton.jit
def _total(value, live):
    return tl.sum(tl.where(live, value, 0.0), 0)


@triton.jit
def spectral_norm(res, N: tl.constexpr):
    """Largest singular value of each map, by power iteration on HᵀH from a vector no map of
    interest is blind to.
    """
    v = (1.0 + 0.125 * tl.arange(0, N).to(tl.float32))[None, None, :]
    v = v + tl.zeros_like(res)
    for _ in range(12):
        w = tl.sum(res * v, 2)
        v = tl.sum(res * w[:, :, None], 1)
        v = v * (1.0 / (tl.sqrt(tl.sum(v * v, 1)) + 1e-30))[:, None]
        v = v[:, None, :] + tl.zeros_like(res)
    w = tl.sum(res * v, 2)
    return tl.sqrt(tl.sum(w * w, 1))


@triton.jit
def measure_maps(res, logits, post, t, T, N: tl.constexpr):
    live = t < T
    fwd = tl.abs(tl.sum(res, 2))
    bwd = tl.abs(tl.sum(res, 1))
    fwd_max = tl.max(fwd, 1) + 0.0 * tl.sum(fwd, 1)
    bwd_max = tl.max(bwd, 1) + 0.0 * tl.sum(bwd, 1)
    sigma = spectral_norm(res, N)
    off = tl.maximum(
        tl.max(tl.abs(tl.sum(res, 2) - 1.0), 1),
        tl.max(tl.abs(tl.sum(res, 1) - 1.0), 1),
    )
    i = tl.arange(0, 16)
    row = tl.zeros((16,), tl.float32)
    row = tl.where(i == 0, _total(fwd_max, live), row)
    row = tl.where(i == 1, _total(bwd_max, live), row)
    row = tl.where(i == 2, _total(tl.min(fwd, 1), live), row)
    row = tl.where(i == 3, _total(tl.min(bwd, 1), live), row)
    row = tl.where(i == 4, _total(sigma, live), row)
    row = tl.where(i == 5, _total(tl.max(post, 1) * N / tl.sum(post, 1), live), row)
    row = tl.where(i == 6, _worst(fwd_max, live), row)
    row = tl.where(i == 7, _worst(bwd_max, live), row)
    row = tl.where(i == 8, _worst(sigma, live), row)
    row = tl.where(i == 9, _worst(off + 0.0 * fwd_max, live), row)
    row = tl.where(i == 10, _worst(tl.max(tl.max(logits, 2), 1), live), row)
    row = tl.where(i == 11, _worst(-tl.min(tl.min(logits, 2), 1), live), row)
    worst = tl.argmax(tl.where(live, tl.maximum(fwd_max, bwd_max), float("-inf")), 0)
    return tl.where(i == 12, (tl.min(t, 0) + worst).to(tl.float32), row)


@triton.jit
def store_maps(stats_ptr, enabled, res, logits, post, t, T, N: tl.constexpr):
    """One row for the program's tokens: SUMS, MAXES, −least logit, worst token; NaN while switched
    off.
    """
    i = tl.arange(0, 16)
    if enabled:
        row = measure_maps(res, logits, post, t, T, N)
    else:
        row = tl.full((16,), float("nan"), tl.float32)
    tl.store(stats_ptr + tl.program_id(0) * 16 + i, row)


@triton.jit
def _together(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return tl.maximum(a0, b0), a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def store_streams(stats_ptr, enabled, amax, after, branch, mixed, before):
    """One row for a token's block of channels: STREAM_FIELDS; NaN while switched off."""
    i = tl.arange(0, 8)
    row = tl.full((8,), float("nan"), tl.float32)
    if enabled:
        # One reduction for all five: warps meet once.
        top, total, b, m, e = tl.reduce((amax, after, branch, mixed, before), 0, _together)
        row = tl.where(i == 0, top + 0.0 * total, row)
        row = tl.where(i == 1, total, row)
        row = tl.where(i == 2, b, row)
        row = tl.where(i == 3, m, row)
        row = tl.where(i == 4, e, row)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(stats_ptr + program * 5 + i, row, i < 5)


@torch.no_grad()
def summarise_maps(rows_SPW: Tensor, tokens: int) -> dict[str, Tensor]:
    """Each site's metrics, (S): means over tokens, extrema, and the token of the largest gain."""
    s, m = len(SUMS), len(MAXES)
    mean = rows_SPW[..., :s].sum(-2) / tokens
    most = rows_SPW[..., s : s + m + 1].amax(-2)
    row = torch.maximum(rows_SPW[..., s], rows_SPW[..., s + 1]).argmax(-1, keepdim=True)
    return {
        **{name: mean[..., i] for i, name in enumerate(SUMS)},
        **{name: most[..., i] for i, name in enumerate(MAXES)},
        "res_logit_min": -most[..., m],
        "worst_token": rows_SPW[..., s + m + 1].gather(-1, row).squeeze(-1).long(),
    }


@torch.no_grad()
def summarise_streams(rows_TBF: Tensor, elements: int) -> dict[str, Tensor]:
    """One site's metrics of the streams, 0-d; `elements` is N·C, the numbers in one token's
    streams.
    """
    after, branch, mixed, before = rows_TBF[..., 1:].sum(-2).unbind(-1)
    b, r = branch.sqrt(), mixed.sqrt()
    gain = (after / before).sqrt()
    return {
        "stream_amax": rows_TBF[..., 0].amax(),
        "stream_rms": (after.mean() / elements).sqrt(),
        "branch_share": (b / (b + r)).mean(),
        "transport_gain_fwd": gain.mean(),
        "transport_gain_fwd_max": gain.max(),
    }
