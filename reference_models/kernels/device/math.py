"""Exponentials and reciprocals on the device, by 2ˣ and 1/√x: one instruction each, where eˣ takes
four and 1/x five.

Errors are a few units of float32's last place; subnormal numbers count as zero.
"""

# Bodies of kernels are Triton's language.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def inverse(x):
    """1/x of what is not negative."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    # Not exp(-x): the sign would be an instruction of its own.
    return inverse(1 + tl.exp2(x * -1.4426950408889634))
