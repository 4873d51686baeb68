"""Exponential, reciprocal and sigmoid on the device, by the hardware's 2ˣ and 1/√x.

eˣ and 1/x of the math library take four and five instructions, these one or two. Errors are a few
units in float32's last place; subnormal numbers are treated as zero.
"""

# Kernel bodies are Triton code.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """eˣ = 2^(x · log₂ e)."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def inverse(x):
    """1/x = (1/√x)², for x ≥ 0."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    """σ(x) = 1 / (1 + e⁻ˣ)."""
    # The sign is part of the constant: exp(-x) would need one more instruction.
    return inverse(1 + tl.exp2(x * -1.4426950408889634))
