"""The clamped activation on the device: one pass forward, one backward.

The kernels run at copy bandwidth, and counting has to fit into the same pass: each lane keeps its
own extrema and sums for PARTS rows, and lanes exchange them once a program.
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.device.swiglu_counts import (
    COUNTS_WIDTH,
    most,
    nan_max,
    record_share,
    record_whole,
)
from geodiag.reference_models.kernels.device.swiglu_math import clamp_up, columns, gated, load_both

# A rows (one token at one expert), F expert dim, E experts


@triton.jit
def _activate(
    out_ptr,
    gates,
    ups,
    a0,
    f,
    A,
    F: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    AFTER: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    MEASURED: tl.constexpr,
):
    """Store the products of all rows. If MEASURED, return each lane's largest |gate|, |up| and
    |product|, and its Σ product².
    """
    squares = tl.zeros((BR, f.shape[0]), tl.float32)
    gate_most = squares
    up_most = squares
    out_most = squares
    for r in tl.static_range(PARTS):
        a = a0 + r * BR + tl.arange(0, BR)
        g = gates[r].to(tl.float32)
        u = ups[r].to(tl.float32)
        act, _, _ = gated(g, GATE_LIMIT, ALPHA, AFTER)
        held, _, _ = clamp_up(u, UP_LIMIT, OFFSET)
        out = act * held
        tl.store(
            out_ptr + a[:, None, None] * F + f[None], out, (a < A)[:, None, None] & (f < F)[None]
        )
        if MEASURED:
            # Outside the rows, g and u are loaded as 0; the product is then 0 for every offset.
            gate_most = nan_max(gate_most, most(g))
            up_most = nan_max(up_most, most(u))
            out_most = nan_max(out_most, most(out))
            squares += tl.sum(out * out, 2)
    return gate_most, up_most, out_most, squares


@triton.jit(do_not_specialize=["A"])
def swiglu_fwd(
    x_ptr,
    out_ptr,
    flag_ptr,
    ends_ptr,
    part_ptr,
    A,
    F: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    AFTER: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
    VEC: tl.constexpr,
):
    """PARTS · BR rows and BF columns; with a flag, also one record for each expert in these rows.

    Rows are sorted by expert, and `ends` has the row behind each expert's last. Both the block's
    number and the expert's only rise along the rows, so record `block + expert` has one writer.
    """
    a0 = tl.program_id(0).to(tl.int64) * (PARTS * BR)
    f = (
        tl.program_id(1) * BF
        + (tl.arange(0, BF // VEC) * VEC)[:, None]
        + tl.arange(0, VEC)[None, :]
    )
    gates = ()
    ups = ()
    # All loads come before the first store: the compiler does not move loads across a store.
    for r in tl.static_range(PARTS):
        a = a0 + r * BR + tl.arange(0, BR)
        g, u = load_both(x_ptr, a, f, a < A, F, INTERLEAVED)
        gates = gates + (g,)
        ups = ups + (u,)
    if part_ptr is None:
        _activate(
            out_ptr,
            gates,
            ups,
            a0,
            f,
            A,
            F,
            GATE_LIMIT,
            UP_LIMIT,
            ALPHA,
            OFFSET,
            AFTER,
            PARTS,
            BR,
            False,
        )
    elif tl.load(flag_ptr) != 0:
        e = tl.arange(0, EP)
        ends = tl.load(ends_ptr + e, e < E, A)
        gate_most, up_most, out_most, squares = _activate(
            out_ptr,
            gates,
            ups,
            a0,
            f,
            A,
            F,
            GATE_LIMIT,
            UP_LIMIT,
            ALPHA,
            OFFSET,
            AFTER,
            PARTS,
            BR,
            True,
        )
        behind = tl.minimum(a0 + PARTS * BR, A)
        first = tl.sum((ends <= a0).to(tl.int32), 0)
        last = tl.sum((ends < behind).to(tl.int32), 0)
        part = (
            part_ptr
            + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * COUNTS_WIDTH
        )
        if first == last:
            record_whole(
                part + first * tl.num_programs(1) * COUNTS_WIDTH,
                gates,
                ups,
                gate_most,
                up_most,
                out_most,
                squares,
                GATE_LIMIT,
                UP_LIMIT,
                ALPHA,
                AFTER,
                PARTS,
            )
        else:
            for mine in range(first, last + 1):
                record_share(
                    part + mine * tl.num_programs(1) * COUNTS_WIDTH,
                    x_ptr,
                    a0,
                    f,
                    tl.sum(tl.where(e == mine - 1, ends, 0), 0),
                    tl.minimum(tl.sum(tl.where(e == mine, ends, 0), 0), behind),
                    F,
                    GATE_LIMIT,
                    UP_LIMIT,
                    ALPHA,
                    OFFSET,
                    INTERLEAVED,
                    AFTER,
                    PARTS,
                    BR,
                )
    else:
        _activate(
            out_ptr,
            gates,
            ups,
            a0,
            f,
            A,
            F,
            GATE_LIMIT,
            UP_LIMIT,
            ALPHA,
            OFFSET,
            AFTER,
            PARTS,
            BR,
            False,
        )


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
    """d_gate = d · up · gate', d_up = d · gate; a clamped value has no gradient."""
    a = tl.program_id(0).to(tl.int64) * BA + tl.arange(0, BA)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (a < A)[:, None] & (f < F)[None, :]
    gate_column, up_column = columns(f, F, INTERLEAVED)
    gates = a[:, None] * (2 * F) + gate_column[None, :]
    ups = a[:, None] * (2 * F) + up_column[None, :]
    act, slope, _ = gated(
        tl.load(x_ptr + gates, inside, 0.0).to(tl.float32), GATE_LIMIT, ALPHA, AFTER
    )
    held, high, low = clamp_up(tl.load(x_ptr + ups, inside, 0.0).to(tl.float32), UP_LIMIT, OFFSET)
    grad = tl.load(grad_ptr + a[:, None] * F + f[None, :], inside, 0.0).to(tl.float32)
    tl.store(dx_ptr + gates, grad * held * slope, inside)
    tl.store(dx_ptr + ups, tl.where(high | low, 0.0, grad * act), inside)
