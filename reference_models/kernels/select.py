"""Which implementation of the hot operations a model runs: said once, by `ModelConfig(kernels=...)`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.reference_models.config import Kernels
from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.reference import Mix


class Operations(NamedTuple):
    """The operations that have two implementations, with the reference's signatures."""

    sinkhorn: Callable[..., Tensor]
    mhc_before: Callable[..., Mix]
    mhc_after: Callable[..., Tensor]
    clamped_swiglu: Callable[..., Tensor]


REFERENCE = Operations(reference.sinkhorn, reference.mhc_before, reference.mhc_after, reference.clamped_swiglu)


def select(kernels: Kernels, device: torch.device) -> Operations:
    """`auto` is Triton on a CUDA device and the reference elsewhere; the other two are what they say."""
    if kernels == "reference" or (kernels == "auto" and device.type != "cuda"):
        return REFERENCE
    from geodiag.reference_models.kernels import mhc_after, mhc_before, sinkhorn, swiglu

    return Operations(sinkhorn.sinkhorn, mhc_before.mhc_before, mhc_after.mhc_after, swiglu.clamped_swiglu)
