"""Loading one tile of a stream."""

# Bodies of kernels are Triton's language: arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def tile(ptr, t0, j, c0, t, c, inside, N: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """Tokens t of stream j, channels c: through a descriptor of (T, N·C), or by addresses."""
    if TMA:
        return ptr.load([t0, j * C + c0])
    else:
        return tl.load(ptr + (t[:, None] * N + j) * C + c[None, :], inside, 0.0)
