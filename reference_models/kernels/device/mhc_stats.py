"""Statistics of maps and streams, from values that the mHC kernels already hold in registers.

Measuring costs no further read of device memory. Each program writes one row of partial results,
and only while a flag on the device is set, so that switching it on needs no new graph or launch.
`stats_layout` names the columns.
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.stats_layout import MAPS_LAYOUT, STREAMS_LAYOUT

# T tokens, N streams

BLOCK = 8
"""Tokens of one map program of the `mix` kernel, and therefore of one row of its statistics."""

# Columns as constants of the device code.
MAPS_WIDTH = tl.constexpr(16)
"""Floats of one row of the maps' statistics: the columns of `MAPS_LAYOUT`, and zeros."""
_FWD = tl.constexpr(MAPS_LAYOUT.index("amax_gain_fwd"))
_BWD = tl.constexpr(MAPS_LAYOUT.index("amax_gain_bwd"))
_FWD_MIN = tl.constexpr(MAPS_LAYOUT.index("gain_fwd_min"))
_BWD_MIN = tl.constexpr(MAPS_LAYOUT.index("gain_bwd_min"))
_SPECTRAL = tl.constexpr(MAPS_LAYOUT.index("spectral_norm_res"))
_CONCENTRATION = tl.constexpr(MAPS_LAYOUT.index("post_concentration"))
_FWD_MAX = tl.constexpr(MAPS_LAYOUT.index("amax_gain_fwd_max"))
_BWD_MAX = tl.constexpr(MAPS_LAYOUT.index("amax_gain_bwd_max"))
_SPECTRAL_MAX = tl.constexpr(MAPS_LAYOUT.index("spectral_norm_res_max"))
_RESIDUAL = tl.constexpr(MAPS_LAYOUT.index("sinkhorn_residual"))
_LOGIT_MAX = tl.constexpr(MAPS_LAYOUT.index("res_logit_max"))
_LOGIT_MIN = tl.constexpr(MAPS_LAYOUT.index("res_logit_min_negated"))
_WORST_TOKEN = tl.constexpr(MAPS_LAYOUT.index("worst_token"))

SQUARINGS = tl.constexpr(10)
"""Squarings in `spectral_norm`; a test holds it equal to the monitor's own."""

STREAMS_WIDTH = tl.constexpr(len(STREAMS_LAYOUT.names))
STREAM_AMAX = tl.constexpr(STREAMS_LAYOUT.index("amax"))
STREAM_AFTER = tl.constexpr(STREAMS_LAYOUT.index("after"))
STREAM_BRANCH = tl.constexpr(STREAMS_LAYOUT.index("branch"))
STREAM_MIXED = tl.constexpr(STREAMS_LAYOUT.index("mixed"))
STREAM_BEFORE = tl.constexpr(STREAMS_LAYOUT.index("before"))


def maps_shape(tokens: int) -> tuple[int, int]:
    return triton.cdiv(tokens, BLOCK), MAPS_WIDTH.value


def streams_shape(tokens: int, blocks: int) -> tuple[int, int, int]:
    return tokens, blocks, STREAMS_WIDTH.value


@triton.jit
def _worst(value, live):
    """The largest live value; NaN if any live value is NaN, which `tl.max` may skip."""
    return tl.max(tl.where(live, value, float("-inf")), 0) + 0.0 * tl.sum(
        tl.where(live, value, 0.0), 0
    )


@triton.jit
def _total(value, live):
    return tl.sum(tl.where(live, value, 0.0), 0)


@triton.jit
def spectral_norm(h, N: tl.constexpr):
    """‖H‖₂ of each map of a tile (BT, N, N), at most N / (4e·1024) too low: 4e-4 for N = 4.

    G = HᵀH squared 10 times is G^1024; the Rayleigh quotient of its heaviest column is λ₁ of G
    (the definition and the bound's proof are those of `hooks/measure/formulas.py`).
    """
    gram = tl.sum(h[:, :, :, None] * h[:, :, None, :], 1)
    power = tl.where(gram == gram, gram, 0.0)
    for _ in range(SQUARINGS):
        scale = 1.0 / tl.maximum(tl.max(tl.max(tl.abs(power), 2), 1), 1e-30)
        power = power * scale[:, None, None]
        power = tl.sum(power[:, :, :, None] * power[:, None, :, :], 2)
    # Not tl.argmax: of two equally heavy columns, threads that hold copies of a tile can each take
    # another one, and the sum below is 0 then (seen on an H200 for [[a, b], [b, a]]).
    n = tl.arange(0, N)
    v = tl.sum(tl.where(n[None, None, :] == 0, power, 0.0), 2)
    weight = tl.sum(v * v, 1)
    for j in tl.static_range(1, N):
        column = tl.sum(tl.where(n[None, None, :] == j, power, 0.0), 2)
        of_column = tl.sum(column * column, 1)
        heavier = of_column > weight
        weight = tl.where(heavier, of_column, weight)
        v = tl.where(heavier[:, None], column, v)
    value = tl.sum(
        v * tl.sum(tl.where(gram == gram, gram, 0.0) * v[:, None, :], 2), 1
    ) / tl.maximum(tl.sum(v * v, 1), 1e-30)
    return tl.sqrt(tl.maximum(value, 0.0)) + 0.0 * tl.sum(tl.sum(h, 2), 1)


@triton.jit
def measure_maps(res, logits, post, t, T, N: tl.constexpr):
    """Return one row of `MAPS_LAYOUT`.

    Amax gains are the largest |row sum| and |column sum| of H_res (arXiv 2512.24880 §3.1). Both are
    1 for a doubly stochastic map, and `off` is the largest distance from that.
    """
    live = t < T
    # `0.0 * sum` carries a NaN on, which `max` may skip.
    fwd = tl.abs(tl.sum(res, 2))
    bwd = tl.abs(tl.sum(res, 1))
    fwd_max = tl.max(fwd, 1) + 0.0 * tl.sum(fwd, 1)
    bwd_max = tl.max(bwd, 1) + 0.0 * tl.sum(bwd, 1)
    sigma = spectral_norm(res, N)
    off = tl.maximum(
        tl.max(tl.abs(tl.sum(res, 2) - 1.0), 1),
        tl.max(tl.abs(tl.sum(res, 1) - 1.0), 1),
    )
    i = tl.arange(0, MAPS_WIDTH)
    row = tl.zeros((MAPS_WIDTH,), tl.float32)
    row = tl.where(i == _FWD, _total(fwd_max, live), row)
    row = tl.where(i == _BWD, _total(bwd_max, live), row)
    row = tl.where(i == _FWD_MIN, _total(tl.min(fwd, 1), live), row)
    row = tl.where(i == _BWD_MIN, _total(tl.min(bwd, 1), live), row)
    row = tl.where(i == _SPECTRAL, _total(sigma, live), row)
    row = tl.where(i == _CONCENTRATION, _total(tl.max(post, 1) * N / tl.sum(post, 1), live), row)
    row = tl.where(i == _FWD_MAX, _worst(fwd_max, live), row)
    row = tl.where(i == _BWD_MAX, _worst(bwd_max, live), row)
    row = tl.where(i == _SPECTRAL_MAX, _worst(sigma, live), row)
    row = tl.where(i == _RESIDUAL, _worst(off + 0.0 * fwd_max, live), row)
    row = tl.where(i == _LOGIT_MAX, _worst(tl.max(tl.max(logits, 2), 1), live), row)
    row = tl.where(i == _LOGIT_MIN, _worst(-tl.min(tl.min(logits, 2), 1), live), row)
    worst = tl.argmax(tl.where(live, tl.maximum(fwd_max, bwd_max), float("-inf")), 0)
    return tl.where(i == _WORST_TOKEN, (tl.min(t, 0) + worst).to(tl.float32), row)


@triton.jit
def store_maps(stats_ptr, enabled, res, logits, post, t, T, N: tl.constexpr):
    """Store one row of `MAPS_LAYOUT` for the program's tokens; NaN while the flag is 0."""
    i = tl.arange(0, MAPS_WIDTH)
    if enabled:
        row = measure_maps(res, logits, post, t, T, N)
    else:
        row = tl.full((MAPS_WIDTH,), float("nan"), tl.float32)
    tl.store(stats_ptr + tl.program_id(0) * MAPS_WIDTH + i, row)


@triton.jit
def _together(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return tl.maximum(a0, b0), a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def store_streams(stats_ptr, enabled, amax, after, branch, mixed, before):
    """Store one row of `STREAMS_LAYOUT` for a token's channels; NaN while the flag is 0."""
    i = tl.arange(0, 8)
    row = tl.full((8,), float("nan"), tl.float32)
    if enabled:
        # One reduction for all five numbers: warps synchronise once.
        top, total, b, m, e = tl.reduce((amax, after, branch, mixed, before), 0, _together)
        row = tl.where(i == STREAM_AMAX, top + 0.0 * total, row)
        row = tl.where(i == STREAM_AFTER, total, row)
        row = tl.where(i == STREAM_BRANCH, b, row)
        row = tl.where(i == STREAM_MIXED, m, row)
        row = tl.where(i == STREAM_BEFORE, e, row)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(stats_ptr + program * STREAMS_WIDTH + i, row, i < STREAMS_WIDTH)
