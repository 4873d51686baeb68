"""The kernels' definitions in plain torch: same names and signatures, any device, any float type.

The Triton kernels are tested against these, and these against float64 and a third party's model.
"""

from geodiag.reference_models.kernels.reference.hyper_connections import (
    hc_pre,
    mhc_post,
    mhc_pre,
    read_out,
    site_post,
    site_pre,
)
from geodiag.reference_models.kernels.reference.results import (
    Activated,
    Mix,
    Projected,
    Routing,
    Written,
)
from geodiag.reference_models.kernels.reference.router import (
    affinity,
    choose,
    route,
    router_logits,
    weigh,
)
from geodiag.reference_models.kernels.reference.sinkhorn import sinkhorn
from geodiag.reference_models.kernels.reference.swiglu import clamped_swiglu, expert_glu

__all__ = [
    "Activated",
    "Mix",
    "Projected",
    "Routing",
    "Written",
    "affinity",
    "choose",
    "clamped_swiglu",
    "expert_glu",
    "hc_pre",
    "mhc_post",
    "mhc_pre",
    "read_out",
    "route",
    "router_logits",
    "sinkhorn",
    "site_post",
    "site_pre",
    "weigh",
]
