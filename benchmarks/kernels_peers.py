"""The mHC site as other libraries' kernels compute it, for `benchmarks/kernels.py --peers DIR`.

DIR holds the unpacked wheel. Only a peer's two Python files of Triton kernels are run: no compiled extension.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def transformer_engine(directory: Path) -> Callable[..., tuple[Tensor, Tensor]]:
    """(x, phi, alpha, bias, f) → the block's input and the new streams. Its streams are innermost: (S, B, C, N)."""
    sys.path.insert(0, str(directory))

    def gemm(a: Tensor, b: Tensor, out_dtype: torch.dtype, layout: str) -> tuple[Tensor]:
        # Their cuBLAS call for dφ, column-major 'NT'; cuBLAS through torch, tf32 as theirs.
        return ((b.T @ a).to(out_dtype),)

    for name in ("transformer_engine", "transformer_engine.common", "transformer_engine.pytorch"):
        module = types.ModuleType(name)
        module.__path__ = [str(directory.joinpath(*name.split(".")))]
        sys.modules[name] = module
    for name in ("transformer_engine.pytorch.cpp_extensions", "transformer_engine.pytorch.cpp_extensions.gemm"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[name].general_gemm = gemm
    torch.backends.cuda.matmul.allow_tf32 = True
    from transformer_engine.pytorch.triton import mhc

    def site(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        inner, post, res = mhc.mhc_generate_mix_and_aggregate(x, phi, alpha, bias)
        return inner, mhc.mhc_fused_expand_combine(f, None, post, x, res, 4)

    return site
