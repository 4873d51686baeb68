"""Types that describe a model to geodiag: its residual sites, routers, experts and attention.

An adapter returns a `Layout`. Everything in it is reached through functions (`watch`, `weights`,
…), so that geodiag never depends on the names and shapes of one model family. All views follow one
convention, whatever the model's own is: H_res is applied as x' = res @ x, weights as x @ W.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

# T tokens (any leading shape), N streams, C channels, E experts, K experts per token,
# A assignments of tokens to experts, F expert dim


class Removable(Protocol):
    """Handle of a hook."""

    def remove(self) -> None: ...


class StatsRows(NamedTuple):
    """Partial results that a model's kernels measured, and the name of each column."""

    rows: Tensor
    """(…, W), one row for each program of the kernel."""
    names: tuple[str, ...]
    """Names of the first columns, in order. Further columns are not read."""

    def column(self, name: str) -> Tensor:
        """Return one column, without its dimension. Raises ValueError for an unknown name."""
        return self.rows[..., self.names.index(name)]

    def has(self, names: tuple[str, ...]) -> bool:
        """Return whether all of these columns are there."""
        return all(name in self.names for name in names)

    def columns(self, names: tuple[str, ...]) -> Tensor:
        """Return the named columns in this order: a view where they already are neighbours."""
        first = self.names.index(names[0])
        if self.names[first : first + len(names)] == names:
            return self.rows[..., first : first + len(names)]
        return torch.stack([self.column(name) for name in names], -1)


class MixView(NamedTuple):
    """One hyper-connection's forward. `res` is the operator applied to the streams: x' = res @ x.

    In a model without separate streams, `streams` is (…, C).
    """

    streams_TNC: Tensor
    pre_TN: Tensor | None = None
    post_TN: Tensor | None = None
    res_TNN: Tensor | None = None
    logits_TNN: Tensor | None = None
    stats: StatsRows | None = None
    """The maps' geometry, if the model's kernels measured it.

    Rows (P, W) with the names of `GAINS.mean_columns` and `GAINS.extreme_columns`.
    """


class WrittenView(NamedTuple):
    """The streams after a site, as the model's kernels measured them; see `streams.from_kernel`."""

    stats: StatsRows
    """Rows (T, B, W), one for each token and block of channels.

    `amax` of the new streams X', and sums of squares: `after` of X', `branch` of H_postᵀ f, `mixed`
    of H_res X and `before` of X.
    """
    elements: int
    """Number of elements in one token's streams."""


class RouterView(NamedTuple):
    """One router's forward: dense affinities before the balancing bias, and the choice used."""

    hidden_TC: Tensor
    scores_TE: Tensor
    bias_E: Tensor | None
    expert_ids_TK: Tensor
    weights_TK: Tensor


class Choice(NamedTuple):
    """A router's chosen experts, in the router's own order, and their gate weights."""

    expert_ids_TK: Tensor
    weights_TK: Tensor


class ActView(NamedTuple):
    """Pre-activations before any clamp, and the gated product.

    `expert_A` is None for a shared expert.
    """

    gate_AF: Tensor
    up_AF: Tensor
    act_AF: Tensor
    expert_A: Tensor | None
    counts: StatsRows | None = None
    """The result of `experts.count`, if the model's kernels counted: rows (E, W)."""


Sink = Callable[[Callable[[], Any]], None]
"""Receives a view as a function without arguments.

A sink that does not need the view never calls the function; a sink that does can guard the call.
"""

Watch = Callable[[Sink], list[Removable]]
"""Adds hooks that call a sink in every forward, and returns their handles."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One residual site. Sites are ordered by layer, attn before ffn."""

    layer: int
    site: str
    watch_mix: Watch
    """→ MixView"""
    watch_branch: Watch | None
    """→ Tensor, the block's own output"""
    scale_branch: Callable[[float], Removable]
    """Multiplies the block's output until the handle is removed; for planted faults"""
    scale_res: Callable[[float], Removable] | None = None
    """Multiplies H_res, if there is one, until the handle is removed"""
    constrained: bool = False
    """Whether H_res is constrained to be doubly stochastic."""
    measure: Callable[[Tensor | None, Tensor | None], bool] | None = None
    """(flag for maps, flag for streams) → whether the site's kernels can measure

    The kernels measure while the flag, a tensor on the device, is not 0. None switches it off.
    """
    watch_written: Watch | None = None
    """→ WrittenView, for a site whose kernels measure"""


@dataclass(frozen=True, kw_only=True)
class RouterSite:
    """The router of one layer."""

    layer: int
    module: nn.Module
    experts: int
    k: int
    hashed: bool
    """Whether the experts are a fixed function of the token, without a learned choice."""
    watch: Watch
    """→ RouterView"""
    weight: Callable[[], Tensor]
    """→ (E, C), the current weight"""
    bias: Callable[[], Tensor | None]
    """→ (E), the current balancing bias; None if there is none"""
    rescore: Callable[[Tensor, Tensor], Tensor]
    """(hidden, weight) → affinities before the bias"""
    chosen: Callable[[Any], Choice]
    """module output → its choice"""
    replay: Callable[[Any, Tensor], Any]
    """(module output, ids) → the output with that choice and today's gate weights"""


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """The attention of one layer."""

    layer: int
    watch_logits: Watch
    """→ 0-d Tensor, the largest attention logit of sampled queries

    It is computed only when a sink calls for the view.
    """


@dataclass(frozen=True, kw_only=True)
class ExpertSite:
    """The experts of one layer."""

    layer: int
    experts: int
    module: nn.Module
    """Holds the weights of the routed experts."""
    watch: list[Watch]
    """→ ActView; routed experts first, then the shared one"""
    gate_limit: float | None
    up_limit: float | None
    weights: Callable[[], dict[str, Tensor]]
    """→ the current gate, up and down as (E, in, out), applied as x @ W"""
    shared: Callable[[], dict[str, Tensor] | None]
    """→ the same of the shared expert as (1, in, out); None if there is none"""
    activation: Callable[[Tensor, Tensor], Tensor]
    """(gate, up) → input of `down`, including clamps"""
    row_tokens: Callable[[Tensor], Tensor]
    """expert ids (T, K) → the token of each row of the routed experts' ActView"""
    measure: Callable[[Tensor | None], object] | None = None
    """Makes the kernels count while the flag on the device is not 0; None switches it off"""
    set_limit: Callable[[float | None], None] | None = None
    """Sets the clamp of gate and up; None removes it"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything that geodiag can observe in one model."""

    family: str
    layers: list[nn.Module]
    sites: list[Site] = field(default_factory=list)
    routers: list[RouterSite] = field(default_factory=list)
    experts: list[ExpertSite] = field(default_factory=list)
    attention: list[AttentionSite] = field(default_factory=list)
    watch_input: Watch | None = None
    """→ Tensor (…, C), the embedded tokens"""
    watch_end: Watch | None = None
    """→ Tensor, the streams after the last site, shaped as a site's `streams`"""
    tail: nn.Module | None = None
    """The module after the last block, if no module from there on mixes a sequence's tokens"""
    streams: int = 1
    has_stream_axis: bool = True
    """Whether the residual has a dimension for streams, even of size 1."""
    watched: tuple[int, ...] | None = None
    """The layers that are recorded; None for all.

    Composite gains remain products over all sites.
    """
    missing: list[str] = field(default_factory=list)
    """One sentence for each part that this model does not have."""

    def watches(self, layer: int) -> bool:
        """Return whether a layer is recorded."""
        return self.watched is None or layer in self.watched

    def summary(self) -> dict[str, Any]:
        """Return what was found, for the manifest."""
        learned = [r for r in self.routers if not r.hashed]
        return {
            "family": self.family,
            "layers": len(self.layers),
            "sites": len(self.sites),
            "routers": len(self.routers),
            "hash_layers": [r.layer for r in self.routers if r.hashed],
            "experts": self.experts[0].experts if self.experts else 0,
            "experts_per_token": learned[0].k if learned else None,
            "streams": self.streams,
            "constrained": any(s.constrained for s in self.sites),
            "missing": self.missing,
        }
