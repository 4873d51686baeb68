"""Composite gains of every site in one kernel, where there is a GPU; its definition is
`metrics.composite_gains`.

Row sums of a product are the product applied to ones, so a vector a token suffices, forwards and
backwards.
"""

# Bodies of kernels are Triton's language: arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
from torch import Tensor

from geodiag.hooks.measure import formulas as metrics

# S sites, T tokens, N streams

_BLOCK = 64


def composites(res_STNN: Tensor) -> Tensor:
    """(5, S, T): largest and smallest gain forwards, of H_s … H_1, then backwards, of H_S … H_s;
    then ‖H_s‖₂.
    """
    n = res_STNN.shape[-1]
    if not res_STNN.is_cuda or n & (n - 1) or not res_STNN.numel():
        return torch.stack([*metrics.composite_gains(res_STNN), metrics.spectral_norm(res_STNN)])
    return launch(res_STNN)


def launch(res_STNN: Tensor) -> Tensor:
    """The same on Triton; N is a power of two."""
    from geodiag.hooks.measure.composite_gains_kernel import composite

    res = res_STNN.contiguous()
    sites, tokens, n, _ = res.shape
    out = torch.empty(5, sites, tokens, dtype=torch.float32, device=res.device)
    block = _BLOCK if res.is_cuda else tokens
    composite[(-(-tokens // block), 3)](
        res, out, sites, tokens, N=n, BT=1 << (block - 1).bit_length(), num_warps=1
    )
    return out
