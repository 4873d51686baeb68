"""What the operations return, in both implementations."""

from typing import NamedTuple

from torch import Tensor

# T tokens (any leading shape), N streams, C channels, E experts, K experts per token, A = T·K
# assignments, F expert dim, P programs, W columns of their statistics


class Mix(NamedTuple):
    """What a hyper-connection decided for each token, and the input it made for its block."""

    inner_TC: Tensor
    """Block input, Σ_n pre_n x_n."""
    pre_TN: Tensor | None
    post_TN: Tensor | None
    res_TNN: Tensor | None
    """Applied to the streams as `res @ x`: rows are outputs. None where the residual path is the
    identity.
    """
    logits_TNN: Tensor | None
    """`res` before its projection."""
    link: tuple[Tensor, Tensor] | None = None
    """Where the gradient of the streams after the site comes back to its first kernel, to be mixed
    on the way.
    """
    stats_PW: Tensor | None = None
    """The geometry of the maps, where a kernel measured it on the way: rows as `mhc_stats` has
    them.
    """


class Projected(NamedTuple):
    """What a site asks of its streams first, where the kernel that wrote them made it on the way."""

    streams_TNC: Tensor
    """Of these very streams: whoever hands on others has made it void."""
    sums_STK: Tensor
    """[x·φ | Σx²], in partial sums over the width, by the φ of the site that comes next."""


class Written(NamedTuple):
    """The streams after a site."""

    streams_TNC: Tensor
    projected: Projected | None = None
    """For the next site, where it was asked for and the kernels can."""
    stats_TBF: Tensor | None = None
    """What was written and what was kept, where a kernel measured it on the way: rows as
    `mhc_stats` has them.
    """


class Routing(NamedTuple):
    """What a router decided for each token."""

    scores_TE: Tensor
    """Affinities in float32, dense, with gradient."""
    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None = None
    """Before the affinity: what any other choice is weighed from."""


class Activated(NamedTuple):
    """What experts' gated activations made of their rows."""

    out_AF: Tensor
    counts_E8: Tensor | None = None
    """Clamp hits and extrema of each expert, where a kernel counted them on the way: columns as
    `swiglu.Counted`.
    """
