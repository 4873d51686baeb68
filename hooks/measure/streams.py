"""The residual streams between the sites: size, growth in both directions, share of the blocks.

Forward growth is ‖X_{s+1}‖ / ‖X_s‖ of each token; backward growth is the same ratio of the
gradients' norms, towards the input. With mHC both stay near 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import Layout, WrittenView
from geodiag.hooks.measure.metric_group import MetricGroup
from geodiag.hooks.measure.step_buffers import StepBuffers, token_max, token_mean
from geodiag.hooks.measure.step_values import Values

# S sites, P places (S sites, and the end of the last), T tokens, N streams, C channels, B blocks

STREAMS = MetricGroup("streams")


class StreamBatch(NamedTuple):
    """The streams that enter some places in one micro-batch."""

    norm_P: Tensor
    """‖X‖_F of all tokens together."""
    amax_P: Tensor
    gram_PTNN: Tensor
    """X Xᵀ of the sampled tokens."""
    elements: int
    """Numbers in one token's streams."""


@torch.no_grad()
def seen_at_place(x_TNC: Tensor, index: Tensor | None) -> StreamBatch:
    """Return what is kept of the streams at one place; `index` picks the sampled tokens.

    ‖H X‖² = tr(H (X Xᵀ) Hᵀ): the small X Xᵀ is enough to apply the site's map later.
    """
    sample = (x_TNC if index is None else x_TNC.index_select(0, index)).float()
    norm = torch.linalg.vector_norm(x_TNC, dtype=torch.float32)
    low, high = x_TNC.aminmax()  # the ∞-norm takes twenty times as long on a CPU
    elements = x_TNC.shape[1] * x_TNC.shape[2]
    return StreamBatch(norm, torch.maximum(high, -low).float(), sample @ sample.mT, elements)


def declare(buffers: StepBuffers, layout: Layout) -> None:
    """Declare the buffers that the streams of all places need."""
    places = len(layout.sites) + 1
    buffers.add("stream_squares", places)
    buffers.add("stream_amax", places, kind="max")
    buffers.add("grad_square", places)
    buffers.add("stream_norm", places, kind="sample")
    buffers.add("mixed_norm", places - 1, kind="sample")
    buffers.add("branch_norm", places - 1, kind="sample")


@torch.no_grad()
def reduce(seen: StreamBatch, res_STNN: Tensor | None) -> tuple[Values, Tensor]:
    """Return buffer values of all places, and ‖H_res X‖ of the sampled tokens of those with a map.

    res_STNN: the maps of the first places' sampled tokens; None for identity.
    """
    square_PT = seen.gram_PTNN.diagonal(dim1=-2, dim2=-1).sum(-1)
    values = {
        "stream_squares": seen.norm_P.square() / seen.elements,
        "stream_amax": seen.amax_P,
        "stream_norm": square_PT.sqrt(),
    }
    if res_STNN is None:
        return values, square_PT.sqrt()
    gram = seen.gram_PTNN[: len(res_STNN)]
    res = res_STNN[:, : gram.shape[1]]
    return values, ((res @ gram) * res).sum((-2, -1)).clamp_min(0).sqrt()


@torch.no_grad()
def from_kernel(view: WrittenView, index: Tensor | None) -> tuple[Values, Tensor, Values]:
    """Return what kernels measured of the streams after the sites 0 … S-1.

    The streams after a site enter the next: values of the places 1 … S, sampled norms of the places
    0 … S, and values of the sites themselves.
    """
    stats = view.stats
    amax = stats.column("amax").amax((1, 2))
    after = stats.column("after").sum((1, 2))
    if index is not None:
        stats = stats._replace(rows=stats.rows.index_select(1, index))
    norms = stats.columns(("after", "branch", "mixed", "before")).sum(2).sqrt()
    after_ST, branch_ST, mixed_ST, before_ST = norms.unbind(-1)
    return (
        {"stream_squares": after / view.elements, "stream_amax": amax},
        torch.cat([before_ST, after_ST[-1:]]),
        {
            "branch_norm": branch_ST,
            "post_norm": torch.ones_like(branch_ST),
            "mixed_norm": mixed_ST,
        },
    )


class StreamTotals(NamedTuple):
    """The streams of all places in one step."""

    square_P: Tensor
    """Mean square of an element, all tokens."""
    amax_P: Tensor
    grad_norm_P: Tensor
    norm_PT: Tensor
    """‖X‖_F of the sampled tokens."""
    branch_ST: Tensor | None
    """‖H_postᵀ f‖ of the sampled tokens; None if the model does not expose its blocks' output."""
    mixed_ST: Tensor
    """‖H_res X‖ of the sampled tokens."""
    mask_T: Tensor

    @property
    def growth_ST(self) -> Tensor:
        """Growth of each sampled token's streams across each site."""
        return self.norm_PT[1:] / self.norm_PT[:-1]


@torch.no_grad()
def summarise(buffers: StepBuffers, reduced: Values, layout: Layout) -> Values:
    """Return all metrics of the group for one step."""
    branches = any(site.watch_branch is not None for site in layout.sites)
    totals = StreamTotals(
        reduced["stream_squares"] / reduced["tokens"],
        reduced["stream_amax"],
        reduced["grad_square"].sqrt(),
        buffers.sampled("stream_norm"),
        buffers.sampled("post_norm") * buffers.sampled("branch_norm") if branches else None,
        buffers.sampled("mixed_norm"),
        buffers.token_mask(),
    )
    return STREAMS.step_values(totals)


@STREAMS.per_step("layers.stream_rms")
def stream_rms(seen: StreamTotals) -> Tensor:
    return seen.square_P[1:].sqrt()


@STREAMS.per_step("layers.stream_amax")
def stream_amax(seen: StreamTotals) -> Tensor:
    return seen.amax_P[1:]


@STREAMS.per_step("layers.transport_gain_fwd")
def transport_gain_fwd(seen: StreamTotals) -> Tensor:
    return token_mean(seen.growth_ST, seen.mask_T)


@STREAMS.per_step("layers.transport_gain_fwd_max")
def transport_gain_fwd_max(seen: StreamTotals) -> Tensor:
    return token_max(seen.growth_ST, seen.mask_T)


@STREAMS.per_step("layers.transport_gain_bwd")
def transport_gain_bwd(seen: StreamTotals) -> Tensor:
    return seen.grad_norm_P[:-1] / seen.grad_norm_P[1:]


@STREAMS.per_step("layers.branch_share")
def branch_share(seen: StreamTotals) -> Tensor | None:
    if seen.branch_ST is None:
        return None
    return token_mean(seen.branch_ST / (seen.branch_ST + seen.mixed_ST), seen.mask_T)
