"""Counts of clamped activations for each expert: clamp hits, extrema and sums of squares.

A program writes one record for each expert in its tile. Rows are sorted by expert, so a tile nearly
always has one; `per_expert` then adds up an expert's records, which are neighbours in memory.
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.device.swiglu_math import clamp_up, gated, load_both
from geodiag.reference_models.kernels.stats_layout import COUNTS_LAYOUT

# A rows (one token at one expert), F expert dim, E experts

# Columns of a record, and of an expert's row, as constants of the device code.
COUNTS_WIDTH = tl.constexpr(len(COUNTS_LAYOUT.names))
_GATE_HITS = tl.constexpr(COUNTS_LAYOUT.index("clamp_gate_rate"))
_UP_HIGH_HITS = tl.constexpr(COUNTS_LAYOUT.index("clamp_up_high_rate"))
_GATE_AMAX = tl.constexpr(COUNTS_LAYOUT.index("gate_amax"))
_UP_AMAX = tl.constexpr(COUNTS_LAYOUT.index("up_amax"))
_ACT_AMAX = tl.constexpr(COUNTS_LAYOUT.index("act_amax"))
_SQUARE = tl.constexpr(COUNTS_LAYOUT.index("square"))
_ELEMENTS = tl.constexpr(COUNTS_LAYOUT.index("elements"))


@triton.jit
def nan_max(a, b):
    """The larger of two numbers; NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def most(x):
    """Reduce (BR, lanes, VEC) to (BR, lanes): each lane's largest magnitude, or NaN."""
    return tl.reduce(tl.abs(x), 2, nan_max)


@triton.jit
def _largest(magnitudes):
    """Return the bits of the largest magnitude of all lanes.

    Magnitudes are not negative, so their bits as integers have their order, with NaN above ∞: an
    integer maximum keeps a NaN, which a float maximum may skip.
    """
    return tl.max(tl.max(magnitudes.to(tl.int32, bitcast=True), 1), 0)


@triton.jit
def _summed(lanes):
    return tl.sum(tl.sum(lanes, 1), 0)


@triton.jit
def _beyond(bits, LIMIT: tl.constexpr):
    """Whether the magnitude of these bits is beyond the limit, or NaN."""
    beyond = bits > 0x7F800000
    if LIMIT is not None:
        beyond = bits > tl.full((), LIMIT, tl.float32).to(tl.int32, bitcast=True)
    return beyond.to(tl.int32)


@triton.jit
def _hits(
    g, u, GATE_LIMIT: tl.constexpr, UP_LIMIT: tl.constexpr, ALPHA: tl.constexpr, AFTER: tl.constexpr
):
    """Each lane's hits of the gate's limit, of up's from above and from below, one byte each.

    One sum then counts all three; a lane has fewer than 256 elements.
    """
    _, _, gate_hit = gated(g.to(tl.float32), GATE_LIMIT, ALPHA, AFTER)
    _, high, low = clamp_up(u.to(tl.float32), UP_LIMIT, 0.0)
    return tl.sum(gate_hit.to(tl.int32) + tl.where(high, 1 << 8, tl.where(low, 1 << 16, 0)), 2)


@triton.jit
def _write(part_ptr, counts, gate_most, up_most, out_most, squares):
    """Store a record: three counts, bits of three extrema and of Σ product², one unused word."""
    # Two sums in one word: a tile has fewer than 32768 elements.
    two = _summed((counts & 0xFF) + ((counts & 0xFF00) << 8))
    i = tl.arange(0, COUNTS_WIDTH)
    word = tl.where(
        i == _GATE_HITS,
        two & 0xFFFF,
        tl.where(i == _UP_HIGH_HITS, two >> 16, _summed(counts >> 16)),
    )
    word = tl.where(i == _GATE_AMAX, gate_most, word)
    word = tl.where(i == _UP_AMAX, up_most, word)
    word = tl.where(i == _ACT_AMAX, out_most, word)
    word = tl.where(i == _SQUARE, squares.to(tl.int32, bitcast=True), word)
    tl.store(part_ptr + i, word)


@triton.jit
def record_whole(
    part_ptr,
    gates,
    ups,
    gate_most,
    up_most,
    out_most,
    squares,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    AFTER: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Record a tile of one expert. Hits are counted only if an extremum is beyond a limit."""
    gate = _largest(gate_most)
    up = _largest(up_most)
    counts = tl.zeros(gate_most.shape, tl.int32)
    if (_beyond(gate, GATE_LIMIT) | _beyond(up, UP_LIMIT)) != 0:
        for r in tl.static_range(PARTS):
            counts += _hits(gates[r], ups[r], GATE_LIMIT, UP_LIMIT, ALPHA, AFTER)
    _write(part_ptr, counts, gate, up, _largest(out_most), _summed(squares))


@triton.jit
def record_share(
    part_ptr,
    x_ptr,
    a0,
    f,
    start,
    end,
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
    """Record one expert's rows of a shared tile, `start` to `end`, read again from the cache."""
    squares = tl.zeros((BR, f.shape[0]), tl.float32)
    gate_most = squares
    up_most = squares
    out_most = squares
    counts = tl.zeros(squares.shape, tl.int32)
    for r in range(PARTS):
        a = a0 + r * BR + tl.arange(0, BR)
        g, u = load_both(x_ptr, a, f, (a >= start) & (a < end), F, INTERLEAVED)
        counts += _hits(g, u, GATE_LIMIT, UP_LIMIT, ALPHA, AFTER)
        act, _, _ = gated(g.to(tl.float32), GATE_LIMIT, ALPHA, AFTER)
        held, _, _ = clamp_up(u.to(tl.float32), UP_LIMIT, OFFSET)
        gate_most = nan_max(gate_most, most(g.to(tl.float32)))
        up_most = nan_max(up_most, most(u.to(tl.float32)))
        out_most = nan_max(out_most, most(act * held))
        squares += tl.sum(act * held * act * held, 2)
    _write(
        part_ptr,
        counts,
        _largest(gate_most),
        _largest(up_most),
        _largest(out_most),
        _summed(squares),
    )


@triton.jit(do_not_specialize=["COLUMNS"])
def per_expert(
    part_ptr,
    flag_ptr,
    ends_ptr,
    out_ptr,
    COLUMNS,
    F: tl.constexpr,
    BA: tl.constexpr,
    BR: tl.constexpr,
):
    """Reduce one expert's records to its row of `COUNTS_LAYOUT`; NaN while the flag is 0."""
    e = tl.program_id(0)
    start = tl.load(ends_ptr + e - 1, e > 0, 0)
    end = tl.load(ends_ptr + e)
    i = tl.arange(0, COUNTS_WIDTH)
    counts = tl.zeros((COUNTS_WIDTH,), tl.int64)
    highest = tl.zeros((COUNTS_WIDTH,), tl.int32)
    squares = tl.zeros((COUNTS_WIDTH,), tl.float32)
    enabled = tl.load(flag_ptr) != 0
    if enabled & (end > start):
        first = (start // BA + e) * COLUMNS
        behind = ((end - 1) // BA + e + 1) * COLUMNS
        for r0 in range(first, behind, BR):
            r = r0 + tl.arange(0, BR)
            word = tl.load(
                part_ptr + r[:, None] * COUNTS_WIDTH + i[None, :], (r < behind)[:, None], 0
            )
            counts += tl.sum(word.to(tl.int64), 0)
            highest = tl.maximum(highest, tl.max(word, 0))
            squares += tl.sum(word.to(tl.float32, bitcast=True), 0)
    value = tl.where(i < _GATE_AMAX, counts.to(tl.float32), highest.to(tl.float32, bitcast=True))
    value = tl.where(i == _SQUARE, squares, value)
    value = tl.where(i == _ELEMENTS, (end - start).to(tl.float32) * F, value)
    tl.store(out_ptr + e * COUNTS_WIDTH + i, tl.where(enabled, value, float("nan")))
