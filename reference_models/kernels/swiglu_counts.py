"""What a tile of clamped activations says of each expert: clamp hits, extrema, squares.

A program writes one record for each expert whose rows are in its tile; as rows are sorted, that is nearly always one.
"""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.swiglu_math import clamp_up, gated, load_both

# A rows (one token at one expert), F expert dim, E experts


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(most):
    """The largest of a tile of magnitudes as a whole number with its bits: above infinity's where there is a NaN."""
    return tl.max(tl.max(most.to(tl.int32, bitcast=True), 1), 0)


@triton.jit
def _beyond(bits, LIMIT: tl.constexpr):
    """Whether the magnitude of these bits is beyond the limit, or NaN."""
    beyond = bits > 0x7F800000
    if LIMIT is not None:
        beyond = bits > tl.full((), LIMIT, tl.float32).to(tl.int32, bitcast=True)
    return beyond.to(tl.int32)


@triton.jit
def record(
    part_ptr,
    x_ptr,
    a0,
    f,
    start,
    end,
    gate_most,
    up_most,
    out_most,
    squares,
    KNOWN: tl.constexpr,
    F: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    AFTER: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
):
    """Eight words for the tile's rows from `start` to `end`: three counts, three extrema's bits, Σ product².

    Reads the tile once more, from the cache: for its hits, which most tiles do not have, and, unless they are KNOWN,
    for extrema and squares, of a tile that several experts share.
    """
    both = tl.zeros(gate_most.shape, tl.int32)
    lows = both
    if KNOWN:
        # Only a value beyond a limit can have hit it.
        beyond = _beyond(largest(gate_most), GATE_LIMIT) | _beyond(largest(up_most), UP_LIMIT)
    else:
        beyond = 1
        gate_most = tl.zeros(gate_most.shape, tl.float32)
        up_most = gate_most
        out_most = gate_most
        squares = gate_most
    if beyond != 0:
        for r in range(PARTS):
            a = a0 + r * BR + tl.arange(0, BR)
            g, u = load_both(x_ptr, a, f, (a >= start) & (a < end), F, INTERLEAVED)
            act, _, gate_hit = gated(g.to(tl.float32), GATE_LIMIT, ALPHA, AFTER)
            held, high, low = clamp_up(u.to(tl.float32), UP_LIMIT, OFFSET)
            # Two counts in one word: a tile has fewer than 65536 elements.
            both += gate_hit.to(tl.int32) + (high.to(tl.int32) << 16)
            lows += low.to(tl.int32)
            if not KNOWN:
                gate_most = nan_max(gate_most, tl.abs(g.to(tl.float32)))
                up_most = nan_max(up_most, tl.abs(u.to(tl.float32)))
                out_most = nan_max(out_most, tl.abs(act * held))
                squares += act * held * act * held
    two = tl.sum(tl.sum(both, 1), 0)
    i = tl.arange(0, 8)
    word = tl.where(i == 0, two & 0xFFFF, tl.where(i == 1, two >> 16, tl.sum(tl.sum(lows, 1), 0)))
    word = tl.where(i == 3, largest(gate_most), word)
    word = tl.where(i == 4, largest(up_most), word)
    word = tl.where(i == 5, largest(out_most), word)
    word = tl.where(i == 6, tl.sum(tl.sum(squares, 1), 0).to(tl.int32, bitcast=True), word)
    tl.store(part_ptr + i, word)


@triton.jit(do_not_specialize=["COLUMNS"])
def per_expert(part_ptr, flag_ptr, ends_ptr, out_ptr, COLUMNS, F: tl.constexpr, BA: tl.constexpr, BR: tl.constexpr):
    """One expert's eight numbers, from its records, which lie one behind another; NaN while switched off."""
    e = tl.program_id(0)
    start = tl.load(ends_ptr + e - 1, e > 0, 0)
    end = tl.load(ends_ptr + e)
    i = tl.arange(0, 8)
    counts = tl.zeros((8,), tl.int64)
    most = tl.zeros((8,), tl.int32)
    squares = tl.zeros((8,), tl.float32)
    enabled = tl.load(flag_ptr) != 0
    if enabled & (end > start):
        first = (start // BA + e) * COLUMNS
        behind = ((end - 1) // BA + e + 1) * COLUMNS
        for r0 in range(first, behind, BR):
            r = r0 + tl.arange(0, BR)
            word = tl.load(part_ptr + r[:, None] * 8 + i[None, :], (r < behind)[:, None], 0)
            counts += tl.sum(word.to(tl.int64), 0)
            most = tl.maximum(most, tl.max(word, 0))
            squares += tl.sum(word.to(tl.float32, bitcast=True), 0)
    value = tl.where(i < 3, counts.to(tl.float32), most.to(tl.float32, bitcast=True))
    value = tl.where(i == 6, squares, value)
    value = tl.where(i == 7, (end - start).to(tl.float32) * F, value)
    tl.store(out_ptr + e * 8 + i, tl.where(enabled, value, float("nan")))
