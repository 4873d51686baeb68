"""One mHC site on the fused kernels.

Its two halves are linked: `mhc_post` hands the gradient of the new streams to `mhc_pre`, which
writes the gradient of the streams once, with all its terms.
"""

import torch.nn.functional as F
from torch import Tensor

from geodiag.reference_models.kernels.autograd.mhc_post import mhc_post_linked
from geodiag.reference_models.kernels.autograd.mhc_post_project import fuses, mhc_post_project
from geodiag.reference_models.kernels.autograd.mhc_pre import mhc_pre_linked
from geodiag.reference_models.kernels.reference import Mix, Projected, Written

# T tokens (any leading shape), N streams, C channels


def site_pre(
    x_TNC: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    order: str = "columns-first",
    flag: Tensor | None = None,
    projected: Projected | None = None,
) -> Mix:
    """`reference.site_pre` by Triton; measures the maps while the `flag` on the device is not 0.

    `projected` is the result of the previous site's `site_post`. It is used only if it was made of
    the same streams tensor.
    """
    sums = projected.sums_STK if projected is not None and projected.streams_TNC is x_TNC else None
    mix, link, stats_PW = mhc_pre_linked(
        x_TNC, phi, alpha, bias, iterations, eps, norm_eps, order, flag, sums
    )
    return mix._replace(link=link, stats_PW=None if flag is None else stats_PW)


def site_post(
    x_TNC: Tensor,
    branch_TC: Tensor,
    mix: Mix,
    flag: Tensor | None = None,
    next_phi: Tensor | None = None,
) -> Written:
    """`reference.site_post` by Triton; measures the streams while the device-side `flag` is not 0.

    With `next_phi` of the next site, and streams that the fused kernel takes, the new streams are
    also projected for the next site, which then reads them once less.
    """
    assert mix.post_TN is not None, "only a site with maps is written by a kernel"
    assert mix.res_TNN is not None
    site = (x_TNC, branch_TC, mix.post_TN, mix.res_TNN, mix.link)
    if next_phi is None or not fuses(x_TNC):
        out_TNC, stats_TBF = mhc_post_linked(*site, flag)
        projected = None
    else:
        out_TNC, stats_TBF, sums_STK = mhc_post_project(*site, next_phi, flag)
        projected = Projected(out_TNC, sums_STK)
    return Written(out_TNC, projected, None if flag is None else stats_TBF)


def read_out(
    x_TNC: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """`reference.read_out` by Triton: the block input of a site whose maps are not used."""
    n = x_TNC.shape[-2]
    more = n * n + n
    wide = F.pad(phi, (0, more)), F.pad(alpha, (0, 2)), F.pad(bias, (0, more))
    return mhc_pre_linked(x_TNC, *wide, 1, eps, norm_eps).mix.inner_TC
