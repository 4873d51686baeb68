"""The mHC site by the kernels of other libraries, for `geodiag bench kernels --peers DIR`.

DIR holds the unpacked wheels. Only Python files with Triton kernels are run, no compiled extension.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def transformer_engine(directory: Path) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return (x, phi, alpha, bias, f) → the block's input and the new streams.

    Its streams are innermost: (S, B, C, N).
    """
    mhc = _transformer_engine(directory)

    def site(
        x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor]:
        inner, post, res = mhc.mhc_generate_mix_and_aggregate(x, phi, alpha, bias)
        return inner, mhc.mhc_fused_expand_combine(f, None, post, x, res, 4)

    return site


def transformer_engine_sinkhorn(directory: Path) -> Callable[[Tensor], Tensor]:
    """Return its Sinkhorn of logits (S, B, 4, 4) with 20 iterations, as its site calls it."""
    mhc = _transformer_engine(directory)

    def sinkhorn(logits: Tensor) -> Tensor:
        return mhc.mhc_fused_sinkhorn(logits, 4, recompute_hist=True, iters=20)

    return sinkhorn


def liger(directory: Path) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return (x, phi, alpha, bias, f) → the block's input and the new streams.

    The calls are those of its `LigerMHC` module.
    """
    _stand_in(directory, "liger_kernel", "liger_kernel.ops")
    # The only function that its kernels use; the real module imports half a dozen libraries.
    utils = sys.modules.setdefault("liger_kernel.utils", types.ModuleType("liger_kernel.utils"))
    utils.infer_device = lambda: "cuda"  # type: ignore[attr-defined]
    from liger_kernel.ops import mhc

    def site(
        x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor]:
        # φ in the type of the stream: the fast path according to its documentation.
        maps = mhc.LigerMHCCoeffsFunction.apply(
            x, phi.to(x.dtype), bias, *alpha.unbind(), False, 20, 1e-6, 0.0, 1e-6, 2.0
        )
        inner = mhc.LigerMHCPreFunction.apply(x, maps[0])
        return inner, mhc.LigerMHCPostResFunction.apply(x, f, *maps[1:])

    return site


def _stand_in(directory: Path, *packages: str) -> None:
    """Register packages that find their modules in the folder and run no code of their own."""
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(directory.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, module)


def _transformer_engine(directory: Path) -> Any:
    """Import its module of mHC operators, with stand-ins for packages that load compiled code."""
    if "transformer_engine.pytorch.triton.mhc" in sys.modules:
        return sys.modules["transformer_engine.pytorch.triton.mhc"]

    def gemm(a: Tensor, b: Tensor, out_dtype: torch.dtype, layout: str) -> tuple[Tensor]:
        # Their cuBLAS call for dφ, column-major 'NT'; cuBLAS through torch, tf32 as theirs.
        return ((b.T @ a).to(out_dtype),)

    _stand_in(
        directory, "transformer_engine", "transformer_engine.common", "transformer_engine.pytorch"
    )
    for name in (
        "transformer_engine.pytorch.cpp_extensions",
        "transformer_engine.pytorch.cpp_extensions.gemm",
    ):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[name].general_gemm = gemm  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = True
    from transformer_engine.pytorch.triton import mhc

    return mhc
