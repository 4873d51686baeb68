"""What the operations return, in both implementations."""

from typing import NamedTuple

from torch import Tensor

# T tokens (any leading shape), N streams, C channels, E experts, K experts per token, A = T·K
# assignments, F expert dim, P programs, W columns of their statistics


class Mix(NamedTuple):
    """The coefficients of a hyper-connection for each token, and the input of its block."""

    inner_TC: Tensor
    """Block input, Σ_n pre_n x_n."""
    pre_TN: Tensor | None
    post_TN: Tensor | None
    res_TNN: Tensor | None
    """Applied to the streams as `res @ x`: rows are outputs. None for the identity."""
    logits_TNN: Tensor | None
    """`res` before its projection."""
    link: tuple[Tensor, Tensor] | None = None
    """Tensors through which the site's last kernel returns gradients to its first one."""
    stats_PW: Tensor | None = None
    """Statistics of the maps, if a kernel measured them: rows of `MAPS_LAYOUT`."""


class Projected(NamedTuple):
    """A site's projection of its streams, made by the kernel that wrote the streams."""

    streams_TNC: Tensor
    """The streams that were projected. For any other tensor the sums are not valid."""
    sums_STK: Tensor
    """[x·φ | Σx²] with the next site's φ, as partial sums over the width."""


class Written(NamedTuple):
    """The streams after a site."""

    streams_TNC: Tensor
    projected: Projected | None = None
    """For the next site, if the caller passed its φ and the kernels take the streams."""
    stats_TBF: Tensor | None = None
    """Statistics of the streams, if a kernel measured them: rows of `STREAMS_LAYOUT`."""


class Routing(NamedTuple):
    """A router's choice for each token."""

    scores_TE: Tensor
    """Affinities in float32, dense, with gradient."""
    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None = None
    """Before the affinity; gate weights of another choice are computed from these."""


class Activated(NamedTuple):
    """The result of the experts' gated activation."""

    out_AF: Tensor
    counts_E8: Tensor | None = None
    """Counts of each expert, if a kernel measured them: rows of `COUNTS_LAYOUT`."""
