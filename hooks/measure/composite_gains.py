"""Composite gains and spectral norms of every site: one Triton kernel on a GPU.

The row sums of a product of maps are the product applied to ones, so the kernel carries one
vector a token through all sites, forward and backward. The definition is
`formulas.composite_gains`.
"""

# Bodies of kernels are Triton's language: arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
from torch import Tensor

from geodiag.hooks.measure import formulas

# S sites, T tokens, N streams

_BLOCK = 64


def composites(res_STNN: Tensor) -> Tensor:
    """Return (5, S, T): the largest and the smallest forward gain of H_s … H_1, the largest and the
    smallest backward gain of H_S … H_s, and ‖H_s‖₂.
    """
    n = res_STNN.shape[-1]
    if not res_STNN.is_cuda or n & (n - 1) or not res_STNN.numel():
        return torch.stack([*formulas.composite_gains(res_STNN), formulas.spectral_norm(res_STNN)])
    return launch(res_STNN)


def launch(res_STNN: Tensor) -> Tensor:
    """Run the Triton kernel; N must be a power of two."""
    from geodiag.hooks.measure.composite_gains_kernel import composite

    res = res_STNN.contiguous()
    sites, tokens, n, _ = res.shape
    out = torch.empty(5, sites, tokens, dtype=torch.float32, device=res.device)
    block = _BLOCK if res.is_cuda else tokens
    composite[(-(-tokens // block), 3)](
        res, out, sites, tokens, N=n, BT=1 << (block - 1).bit_length(), num_warps=1
    )
    return out
