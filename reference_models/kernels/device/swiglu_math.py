"""The clamped gated activation of one tile on the device: values, derivatives and clamp hits.

silu(min(g, limit)) · clamp(u, ±limit), DeepSeek-V4's clamped SwiGLU (arXiv 2606.19348); gpt-oss
has g·σ(αg)·(u + 1) with interleaved columns.
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from geodiag.reference_models.kernels.device.math import sigmoid

# A rows (one token at one expert), F expert dim, E experts


@triton.jit
def gated(g, LIMIT: tl.constexpr, ALPHA: tl.constexpr, AFTER: tl.constexpr):
    """g·σ(αg) with the gate clamped, its derivative, and where the limit was hit.

    The clamp is a comparison and not `minimum`, which would replace a NaN by the limit.
    """
    held = g
    if LIMIT is not None and not AFTER:
        held = tl.where(g > LIMIT, LIMIT, g)
    s = sigmoid(ALPHA * held)
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
def clamp_up(u, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """clamp(u, ±LIMIT) + OFFSET, and where u was above and below."""
    high = u > float("inf")
    low = high
    held = u
    if LIMIT is not None:
        high = u > LIMIT
        low = u < -LIMIT
        held = tl.where(high, LIMIT, tl.where(low, -LIMIT, u))
    return held + OFFSET, high, low


@triton.jit
def columns(f, F: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the columns of gate f and up f: alternating, or one half each."""
    if INTERLEAVED:
        return 2 * f, 2 * f + 1
    return f, F + f


@triton.jit
def load_both(x_ptr, a, f, live, F: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load gates and ups of rows a (BR) and columns f (lanes, VEC), each as (BR, lanes, VEC).

    VEC neighbours are 16 bytes of one lane, so a sum over the last dimension stays in the lane.
    """
    gate_column, up_column = columns(f, F, INTERLEAVED)
    inside = live[:, None, None] & (f < F)[None]
    g = tl.load(x_ptr + a[:, None, None] * (2 * F) + gate_column[None], inside, 0.0)
    u = tl.load(x_ptr + a[:, None, None] * (2 * F) + up_column[None], inside, 0.0)
    return g, u
