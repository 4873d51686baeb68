"""What of the clamped activation runs on the device: one pass forward, one backward, and the counts by expert."""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

# A rows (one token at one expert), F expert dim, E experts


@triton.jit
def _gate(g, LIMIT: tl.constexpr, ALPHA: tl.constexpr, AFTER: tl.constexpr):
    """The gate's factor, its derivative, and where it hit its limit. Comparisons, unlike minimum, keep NaN."""
    held = g
    if LIMIT is not None and not AFTER:
        held = tl.where(g > LIMIT, LIMIT, g)
    s = tl.sigmoid(ALPHA * held)
    act = held * s
    slope = s * (1 + ALPHA * held * (1 - s))
    hit = g > float("inf")
    if LIMIT is not None:
        if AFTER:
            hit = act > LIMIT
            act = tl.where(hit, LIMIT, act)
        else:
            hit = g > LIMIT
        slope = tl.where(hit, 0.0, slope)
    return act, slope, hit


@triton.jit
def _up(u, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    high = u > float("inf")
    low = high
    held = u
    if LIMIT is not None:
        high = u > LIMIT
        low = u < -LIMIT
        held = tl.where(high, LIMIT, tl.where(low, -LIMIT, u))
    return held + OFFSET, high, low


@triton.jit
def _columns(f, F: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        return 2 * f, 2 * f + 1
    return f, F + f


@triton.jit
def _worst(most):
    """Row maxima of magnitudes; NaN where a row has one, which `tl.max` would pass over."""
    return tl.max(most, 1) + 0.0 * tl.sum(most, 1)


@triton.jit(do_not_specialize=["A"])
def swiglu_fwd(
    x_ptr,
    out_ptr,
    rows_ptr,
    A,
    F: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    AFTER: tl.constexpr,
    SPAN: tl.constexpr,
    BA: tl.constexpr,
    BF: tl.constexpr,
):
    """SPAN columns of BA rows; all columns where rows are counted, so that lanes meet once a row."""
    a = tl.program_id(0).to(tl.int64) * BA + tl.arange(0, BA)
    gate_hits = tl.zeros((BA, BF), tl.int32)
    up_hits = tl.zeros((BA, BF), tl.int32)
    gate_most = tl.zeros((BA, BF), tl.float32)
    up_most = tl.zeros((BA, BF), tl.float32)
    out_most = tl.zeros((BA, BF), tl.float32)
    squares = tl.zeros((BA, BF), tl.float32)
    for f0 in range(0, SPAN, BF):
        f = tl.program_id(1) * SPAN + f0 + tl.arange(0, BF)
        inside = (a < A)[:, None] & (f < F)[None, :]
        gate_column, up_column = _columns(f, F, INTERLEAVED)
        g = tl.load(x_ptr + a[:, None] * (2 * F) + gate_column[None, :], inside, 0.0).to(tl.float32)
        u = tl.load(x_ptr + a[:, None] * (2 * F) + up_column[None, :], inside, 0.0).to(tl.float32)
        act, _, gate_hit = _gate(g, GATE_LIMIT, ALPHA, AFTER)
        held, high, low = _up(u, UP_LIMIT, OFFSET)
        out = act * held
        tl.store(out_ptr + a[:, None] * F + f[None, :], out, inside)
        if rows_ptr is not None:
            gate_hits += gate_hit.to(tl.int32)
            # Two counts in one word: a row has fewer than 65536 columns a lane.
            up_hits += high.to(tl.int32) + (low.to(tl.int32) << 16)
            gate_most = tl.maximum(gate_most, tl.abs(g), propagate_nan=tl.PropagateNan.ALL)
            up_most = tl.maximum(up_most, tl.abs(u), propagate_nan=tl.PropagateNan.ALL)
            # Outside, g and u read as 0 and so is the product, whatever the offset.
            out_most = tl.maximum(out_most, tl.abs(out), propagate_nan=tl.PropagateNan.ALL)
            squares += out * out
    if rows_ptr is not None:
        row = rows_ptr + a * 7
        tl.store(row, tl.sum(gate_hits, 1).to(tl.float32), a < A)
        tl.store(row + 1, tl.sum(up_hits & 0xFFFF, 1).to(tl.float32), a < A)
        tl.store(row + 2, tl.sum(up_hits >> 16, 1).to(tl.float32), a < A)
        tl.store(row + 3, _worst(gate_most), a < A)
        tl.store(row + 4, _worst(up_most), a < A)
        tl.store(row + 5, _worst(out_most), a < A)
        tl.store(row + 6, tl.sum(squares, 1), a < A)


@triton.jit(do_not_specialize=["A"])
def swiglu_bwd(
    x_ptr,
    grad_ptr,
    dx_ptr,
    A,
    F: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    AFTER: tl.constexpr,
    BA: tl.constexpr,
    BF: tl.constexpr,
):
    a = tl.program_id(0).to(tl.int64) * BA + tl.arange(0, BA)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (a < A)[:, None] & (f < F)[None, :]
    gate_column, up_column = _columns(f, F, INTERLEAVED)
    gates = a[:, None] * (2 * F) + gate_column[None, :]
    ups = a[:, None] * (2 * F) + up_column[None, :]
    act, slope, _ = _gate(tl.load(x_ptr + gates, inside, 0.0).to(tl.float32), GATE_LIMIT, ALPHA, AFTER)
    held, high, low = _up(tl.load(x_ptr + ups, inside, 0.0).to(tl.float32), UP_LIMIT, OFFSET)
    grad = tl.load(grad_ptr + a[:, None] * F + f[None, :], inside, 0.0).to(tl.float32)
    tl.store(dx_ptr + gates, grad * held * slope, inside)
    tl.store(dx_ptr + ups, tl.where(high | low, 0.0, grad * act), inside)


@triton.jit(do_not_specialize=["A"])
def per_expert(rows_ptr, expert_ptr, part_ptr, A, E: tl.constexpr, EP: tl.constexpr, BA: tl.constexpr):
    """part[p, e] = the seven fields of expert e over this program's rows."""
    a = tl.program_id(0).to(tl.int64) * BA + tl.arange(0, BA)
    e = tl.arange(0, EP)
    expert = tl.load(expert_ptr + a, a < A, -1)
    mine = expert[:, None] == e[None, :]
    part = part_ptr + (tl.program_id(0).to(tl.int64) * E + e) * 7
    for field in tl.static_range(7):
        value = tl.load(rows_ptr + a * 7 + field, a < A, 0.0)
        picked = tl.where(mine, value[:, None], 0.0)
        if field < 3 or field == 6:
            total = tl.sum(picked, 0)
        else:
            total = tl.max(picked, 0) + 0.0 * tl.sum(picked, 0)
        tl.store(part + field, total, e < E)
