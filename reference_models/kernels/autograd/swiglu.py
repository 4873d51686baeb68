"""Clamped gated activations as an operation of torch, with counts from the same pass."""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.reference_models.kernels.autograd.launch import FLOATS, cdiv, power_of_two
from geodiag.reference_models.kernels.autograd.operation import operation
from geodiag.reference_models.kernels.device.swiglu import swiglu_bwd, swiglu_fwd
from geodiag.reference_models.kernels.device.swiglu_counts import COUNTS_WIDTH, per_expert
from geodiag.reference_models.kernels.reference import Activated
from geodiag.reference_models.kernels.stats_layout import COUNTS_LAYOUT

# A rows (one token at one expert), F expert dim, E experts


class Activation(NamedTuple):
    """Parameters of a model's gated activation."""

    gate_limit: float | None = 10.0
    up_limit: float | None = 10.0
    alpha: float = 1.0
    """g·σ(alpha·g); gpt-oss has 1.702."""
    up_offset: float = 0.0
    interleaved: bool = False
    """Whether columns of gate and up alternate, instead of one half each."""
    clamp_after: bool = False
    """Whether the gate's limit applies to g·σ(g) instead of g."""


DEEPSEEK_V4 = Activation()


class Counted(NamedTuple):
    """The activation, and each expert's counts: NaN while the flag is 0, extrema 0 without rows."""

    out_AF: Tensor
    counts_E8: Tensor

    @property
    def by_name(self) -> dict[str, Tensor]:
        """The columns of `COUNTS_LAYOUT`, each (E,). Counts are exact up to 2²⁴."""
        return COUNTS_LAYOUT.named(self.counts_E8)


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
    """Return the rows and columns of a program: 16 bytes a lane, several rows a program."""
    bf = min(256, power_of_two(f))
    return (1024 // bf if x.is_cuda else 8), bf


PARTS = 4
"""Rows of a counting program. It is one warp, whose lanes exchange their sums once for all rows,
without waiting for another warp.
"""
REGISTERS = 80
"""Registers of a lane that counts. Without this limit it takes 122, and then too few programs fit
on a multiprocessor to hide the loads (16 instead of 25). float32, alternating columns and a clamp
after the gate need more registers and would spill, so they have no limit.
"""
RECORDS = 2048
"""Records that an expert's program adds at a time: most experts have fewer in a training step."""


def _forward(
    x: Tensor,
    gate_limit: float | None,
    up_limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: bool,
    clamp_after: bool,
    ends: Tensor | None,
    flag: Tensor | None,
) -> tuple[Tensor, Tensor]:
    activation = Activation(gate_limit, up_limit, alpha, up_offset, interleaved, clamp_after)
    out, counts = _outputs(x, ends)
    a, f = out.shape
    br, bf = _blocks(x, f)
    experts, parts, warps = 0, 1, 4
    if ends is not None:
        experts, parts, br, warps = len(ends), PARTS, 1 if x.is_cuda else br, 1
    columns, ba = cdiv(f, bf), parts * br
    # Blocks and experts both only rise along the sorted rows, so `block + expert` is a different
    # number for every pair that occurs.
    part = (
        x.new_empty(cdiv(a, ba) + experts, columns, COUNTS_WIDTH.value, dtype=torch.int32)
        if experts
        else None
    )
    meta = _meta(activation, f)
    if a:
        grid = (cdiv(a, ba), columns)
        tile = {"E": experts, "EP": power_of_two(experts), "PARTS": parts, "BR": br, "BF": bf}
        tile["VEC"] = min(16 // x.itemsize, bf)
        lean = x.itemsize == 2 and not interleaved and not clamp_after
        limit = {"maxnreg": REGISTERS} if experts and lean else {}
        swiglu_fwd[grid](x, out, flag, ends, part, a, **meta, **tile, num_warps=warps, **limit)
    if experts:
        records = RECORDS if x.is_cuda else 256
        per_expert[(experts,)](
            part, flag, ends, counts, columns, F=f, BA=ba, BR=records, num_warps=8
        )
    return out, counts


def _outputs(x: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor]:
    a, f = x.shape[0], x.shape[1] // 2
    experts = 0 if ends is None else ends.shape[0]
    return x.new_empty(a, f), torch.empty(
        experts, COUNTS_WIDTH.value, dtype=torch.float32, device=x.device
    )


def _backward(
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


def _fake(x, gate_limit, up_limit, alpha, up_offset, interleaved, clamp_after, ends, flag):
    return _outputs(x, ends)


def _fake_backward(x, grad, *rest):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    x, *ctx.rest, _, _ = inputs
    ctx.save_for_backward(x)
    ctx.set_materialize_grads(False)


def _grad(ctx, grad, _counts):
    dx = None if grad is None else _glu_backward(*ctx.saved_tensors, grad.contiguous(), *ctx.rest)
    return (dx, *[None] * 8)


_glu_backward = operation("clamped_glu_backward", _backward, _fake_backward)
_glu = operation("clamped_glu", _forward, _fake, _keep, _grad)


def _flat(gate_up_A2F: Tensor) -> Tensor:
    if gate_up_A2F.dtype not in FLOATS:
        raise TypeError(
            f"the Triton kernels take bfloat16, float16 or float32, not {gate_up_A2F.dtype}"
        )
    if gate_up_A2F.shape[-1] % 2:
        raise ValueError(f"gate and up need an even width, not {gate_up_A2F.shape[-1]}")
    return gate_up_A2F.contiguous().view(-1, gate_up_A2F.shape[-1])


def clamped_swiglu(gate_up_A2F: Tensor, limit: float | None = 10.0) -> Tensor:
    """`reference.clamped_swiglu` by Triton: one pass forward, one backward."""
    flat = _flat(gate_up_A2F)
    out, _ = _glu(flat, limit, limit, 1.0, 0.0, False, False, None, None)
    return out.view(*gate_up_A2F.shape[:-1], out.shape[-1])


def counted_glu(
    gate_up_A2F: Tensor,
    ends_E: Tensor,
    activation: Activation = DEEPSEEK_V4,
    flag: Tensor | None = None,
) -> Counted:
    """Apply a model's clamped activation, and count for each expert in the same pass.

    Rows are sorted by expert; `ends_E` is the row after each expert's last, as for grouped matmuls.
    With a `flag`, an integer on the device, rows are counted only while the flag is not 0.
    """
    if flag is None:
        flag = torch.ones((), dtype=torch.int32, device=gate_up_A2F.device)
    flat = _flat(gate_up_A2F)
    out, counts = _glu(flat, *activation, ends_E.contiguous(), flag)
    return Counted(out.view(*gate_up_A2F.shape[:-1], out.shape[-1]), counts)


def expert_glu(
    gate_up_A2F: Tensor,
    limit: float | None = 10.0,
    ends_E: Tensor | None = None,
    flag: Tensor | None = None,
) -> Activated:
    """`reference.expert_glu` by Triton; counts rows while the `flag` on the device is not 0."""
    if flag is None:
        return Activated(clamped_swiglu(gate_up_A2F, limit))
    if ends_E is None:
        rows = gate_up_A2F.numel() // max(gate_up_A2F.shape[-1], 1)
        ends_E = torch.full((1,), rows, dtype=torch.int32, device=gate_up_A2F.device)
    return Activated(*counted_glu(gate_up_A2F, ends_E, Activation(limit, limit), flag))
