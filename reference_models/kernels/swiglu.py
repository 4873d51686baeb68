"""Clamped gated activations: forward, backward, and how often each expert's clamps were hit, in the same pass."""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from geodiag.reference_models.kernels.launch import FLOATS, cdiv, power_of_two

# A rows (one token at one expert), F expert dim, E experts


class Activation(NamedTuple):
    """A gated activation as its model wrote it; METRICS' parameters."""

    gate_limit: float | None = 10.0
    up_limit: float | None = 10.0
    alpha: float = 1.0
    """g·σ(alpha·g); gpt-oss has 1.702."""
    up_offset: float = 0.0
    interleaved: bool = False
    """Gate and up alternate, instead of one half each."""
    clamp_after: bool = False
    """The gate's limit holds after g·σ(g), not before."""


DEEPSEEK_V4 = Activation()


class Counted(NamedTuple):
    out_AF: Tensor
    hits_E3: Tensor
    """Elements above the gate's limit, above the up limit, below its negative; int64."""
    extrema_E3: Tensor
    """Largest |gate| and |up| before their clamps, and |product|; 0 for an expert without rows."""
    squares_E: Tensor
    """Σ product², for the expert's RMS."""


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
def _swiglu_fwd(
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
def _swiglu_bwd(
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
def _per_expert(rows_ptr, expert_ptr, part_ptr, A, E: tl.constexpr, EP: tl.constexpr, BA: tl.constexpr):
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


def _meta(activation: Activation, f: int) -> dict[str, object]:
    return {
        "F": f,
        "GATE_LIMIT": activation.gate_limit,
        "UP_LIMIT": activation.up_limit,
        "ALPHA": activation.alpha,
        "OFFSET": activation.up_offset,
        "INTERLEAVED": activation.interleaved,
        "AFTER": activation.clamp_after,
    }


def _blocks(x: Tensor, f: int) -> tuple[int, int]:
    """Rows and columns of a program: 16 bytes a lane, a few rows to share its start."""
    bf = min(256, power_of_two(f))
    return (1024 // bf if x.is_cuda else 8), bf


@torch.library.custom_op("geodiag::clamped_glu", mutates_args=())
def _glu(
    x: Tensor,
    gate_limit: float | None,
    up_limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: bool,
    clamp_after: bool,
    counted: bool,
) -> tuple[Tensor, Tensor]:
    activation = Activation(gate_limit, up_limit, alpha, up_offset, interleaved, clamp_after)
    a, f = x.shape[0], x.shape[1] // 2
    out, rows = _outputs(x, counted)
    if a:
        ba, bf = _blocks(x, f)
        span = cdiv(f, bf) * bf if counted else bf
        _swiglu_fwd[(cdiv(a, ba), cdiv(f, span))](
            x, out, rows if counted else None, a, **_meta(activation, f), SPAN=span, BA=ba, BF=bf, num_warps=4
        )
    return out, rows


def _outputs(x: Tensor, counted: bool) -> tuple[Tensor, Tensor]:
    a, f = x.shape[0], x.shape[1] // 2
    return x.new_empty(a, f), torch.empty(a if counted else 0, 7, dtype=torch.float32, device=x.device)


@torch.library.custom_op("geodiag::clamped_glu_backward", mutates_args=())
def _glu_backward(
    x: Tensor,
    grad: Tensor,
    gate_limit: float | None,
    up_limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: bool,
    clamp_after: bool,
) -> Tensor:
    activation = Activation(gate_limit, up_limit, alpha, up_offset, interleaved, clamp_after)
    dx = torch.empty_like(x)
    a, f = grad.shape
    if a:
        ba, bf = _blocks(x, f)
        grid = (cdiv(a, ba), cdiv(f, bf))
        _swiglu_bwd[grid](x, grad, dx, a, **_meta(activation, f), BA=ba, BF=bf, num_warps=4)
    return dx


@_glu.register_fake
def _(x, gate_limit, up_limit, alpha, up_offset, interleaved, clamp_after, counted):
    return _outputs(x, counted)


@_glu_backward.register_fake
def _(x, grad, *rest):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    x, *ctx.rest, _ = inputs
    ctx.save_for_backward(x)
    ctx.set_materialize_grads(False)


def _grad(ctx, grad, _rows):
    dx = None if grad is None else _glu_backward(*ctx.saved_tensors, grad.contiguous(), *ctx.rest)
    return (dx, *[None] * 7)


_glu.register_autograd(_grad, setup_context=_keep)


@torch.library.custom_op("geodiag::clamp_counts", mutates_args=())
def _counts(rows: Tensor, expert: Tensor, experts: int) -> Tensor:
    a, fields = rows.shape
    block = 128
    part = torch.empty(cdiv(a, block), experts, fields, dtype=torch.float32, device=rows.device)
    if a:
        _per_expert[(cdiv(a, block),)](
            rows, expert, part, a, E=experts, EP=power_of_two(experts), BA=block, num_warps=4
        )
    return part


@_counts.register_fake
def _(rows, expert, experts):
    return rows.new_empty(cdiv(rows.shape[0], 128), experts, rows.shape[1])


def _flat(gate_up_A2F: Tensor) -> Tensor:
    if gate_up_A2F.dtype not in FLOATS:
        raise TypeError(f"the Triton kernels take bfloat16, float16 or float32, not {gate_up_A2F.dtype}")
    if gate_up_A2F.shape[-1] % 2:
        raise ValueError(f"gate and up need an even width, not {gate_up_A2F.shape[-1]}")
    return gate_up_A2F.contiguous().view(-1, gate_up_A2F.shape[-1])


def clamped_swiglu(gate_up_A2F: Tensor, limit: float | None = 10.0) -> Tensor:
    """`reference.clamped_swiglu` in one pass each way."""
    flat = _flat(gate_up_A2F)
    out, _ = _glu(flat, limit, limit, 1.0, 0.0, False, False, False)
    return out.view(*gate_up_A2F.shape[:-1], out.shape[-1])


def counted_glu(gate_up_A2F: Tensor, expert_A: Tensor, experts: int, activation: Activation = DEEPSEEK_V4) -> Counted:
    """Any model's clamped activation, with what METRICS asks of each expert, from the same pass."""
    out, rows = _glu(_flat(gate_up_A2F), *activation, True)
    part = _counts(rows.detach(), expert_A.contiguous(), experts)
    total, most = part.sum(0), part.amax(0)
    return Counted(out, total[:, :3].long(), most[:, 3:6], total[:, 6])
