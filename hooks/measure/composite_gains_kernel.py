"""Triton kernel of `composites`, imported only where Triton is used."""

# Bodies of kernels are Triton's language: arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from geodiag.hooks.measure import formulas

# S sites, T tokens, N streams

SQUARINGS = tl.constexpr(formulas.SQUARINGS)


@triton.jit
def _nan_if_any(value, gain, AXIS: tl.constexpr):
    """The largest or smallest gain; NaN if any gain is, because reductions may skip a NaN."""
    return value + 0.0 * tl.sum(gain, AXIS)


@triton.jit
def _spectral_norm(h, N: tl.constexpr):
    """`formulas.spectral_norm` of a tile (BT, N, N): same steps, same error bound."""
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


@triton.jit(do_not_specialize=["S", "T"])
def composite(res_ptr, out_ptr, S, T, N: tl.constexpr, BT: tl.constexpr):
    """Carry BT tokens through all sites: program (·, 0) forward, (·, 1) backward; program (·, 2)
    computes the spectral norm of each site.

    v ← H_s v, v = 1 at first, so v = row sums of H_s … H_1; backward v ← H_sᵀ v from the last site.
    """
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    n = tl.arange(0, N)
    live = t < T
    tile = n[None, :, None] * N + n[None, None, :]
    way = tl.program_id(1)
    v = tl.full((BT, N), 1.0, tl.float32)
    for i in range(S):
        s = tl.where(way == 1, S - 1 - i, i).to(tl.int64)
        at = res_ptr + (s * T + t)[:, None, None] * N * N + tile
        res = tl.load(at, tl.broadcast_to(live[:, None, None], (BT, N, N)), 0.0)
        out = out_ptr + (2 * way * S + s) * T + t
        if way == 2:
            tl.store(out, _spectral_norm(res, N), live)
        else:
            if way == 1:
                v = tl.sum(res * v[:, :, None], 1)
            else:
                v = tl.sum(res * v[:, None, :], 2)
            gain = tl.abs(v)
            known = tl.where(gain == gain, gain, 0.0)
            tl.store(out, _nan_if_any(tl.max(known, 1), gain, 1), live)
            tl.store(out + S * T, _nan_if_any(tl.min(known, 1), gain, 1), live)
