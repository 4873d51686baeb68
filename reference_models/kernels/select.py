"""Choice of the implementation of the hot operations, by `ModelConfig(kernels=...)` alone."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.reference_models.kernels import Kernels, reference
from geodiag.reference_models.kernels.reference import Activated, Mix, Routing, Written


class Operations(NamedTuple):
    """The operations with two implementations, with the signatures of the reference."""

    site_pre: Callable[..., Mix]
    site_post: Callable[..., Written]
    expert_glu: Callable[..., Activated]
    route: Callable[..., Routing]
    read_out: Callable[..., Tensor]


REFERENCE = Operations(
    reference.site_pre,
    reference.site_post,
    reference.expert_glu,
    reference.route,
    reference.read_out,
)


def select(kernels: Kernels, device: torch.device) -> Operations:
    """Return the operations for a device: `auto` is Triton on CUDA, and the reference elsewhere."""
    if kernels == "reference" or (kernels == "auto" and device.type != "cuda"):
        return REFERENCE
    from geodiag.reference_models.kernels.autograd import site, swiglu
    from geodiag.reference_models.kernels.autograd.router import routed

    return Operations(site.site_pre, site.site_post, swiglu.expert_glu, routed, site.read_out)
