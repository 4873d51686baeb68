"""Loading one tile of a stream."""

# Kernel bodies are Triton code: arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def tile(ptr, t0, j, c0, t, c, inside, N: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """Load tokens t of stream j, channels c: by the copy engine (TMA) or by addresses.

    TMA keeps loads in flight without registers for addresses, and pipelines safely into a product.
    """
    if TMA:
        return ptr.load([t0, j * C + c0])
    else:
        return tl.load(ptr + (t[:, None] * N + j) * C + c[None, :], inside, 0.0)
