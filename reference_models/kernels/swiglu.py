"""Clamped gated activations: forward, backward, and how often each expert's clamps were hit, in the same pass."""

# Bodies of kernels are Triton's language: tuples grow, arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.reference_models.kernels.launch import FLOATS, cdiv, power_of_two
from geodiag.reference_models.kernels.swiglu_device import per_expert, swiglu_bwd, swiglu_fwd

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
        swiglu_fwd[(cdiv(a, ba), cdiv(f, span))](
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
        swiglu_bwd[grid](x, grad, dx, a, **_meta(activation, f), BA=ba, BF=bf, num_warps=4)
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
        per_expert[(cdiv(a, block),)](rows, expert, part, a, E=experts, EP=power_of_two(experts), BA=block, num_warps=4)
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
