"""What an adapter tells geodiag about a model: where its sites, routers and experts are, and which
way they point.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

# T tokens (any leading shape), N streams, C channels, E experts, K experts per token, A
# assignments, F expert dim


class Removable(Protocol):
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

    def columns(self, names: tuple[str, ...]) -> Tensor:
        """Return the named columns in this order: a view where they already are neighbours."""
        first = self.names.index(names[0])
        if self.names[first : first + len(names)] == names:
            return self.rows[..., first : first + len(names)]
        return torch.stack([self.column(name) for name in names], -1)


class MixView(NamedTuple):
    """One hyper-connection's forward. `res` is the operator applied to the streams: x' = res @ x.

    Where the model has no separate streams, `streams` is (…, C): one stream.
    """

    streams_TNC: Tensor
    pre_TN: Tensor | None = None
    post_TN: Tensor | None = None
    res_TNN: Tensor | None = None
    logits_TNN: Tensor | None = None
    stats: StatsRows | None = None
    """The maps' geometry, where the model's kernels measured it: rows (P, W) with the names of
    `reduce.SITE_SUMS` and `reduce.SITE_MAXES`.
    """


class WrittenView(NamedTuple):
    """The streams after a site, as the model's kernels measured them; see `reduce.written`."""

    stats: StatsRows
    """Rows (T, B, W), one for each token and block of channels: `amax` of the new streams X', and
    sums of squares `after` of X', `branch` of H_postᵀ f, `mixed` of H_res X and `before` of X.
    """
    elements: int
    """Numbers in one token's streams."""


class RouterView(NamedTuple):
    """One router's forward: dense affinities before the balancing bias, and the choice that was
    used.
    """

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
    """Pre-activations before any clamp, and the gated product; `expert_A` None for a shared expert."""

    gate_AF: Tensor
    up_AF: Tensor
    act_AF: Tensor
    expert_A: Tensor | None
    counts: StatsRows | None = None
    """The result of `reduce.counts`, where the model's kernels counted: rows (E, W)."""


Sink = Callable[[Callable[[], Any]], None]
"""Takes a view, wrapped in a call: a sink that is not interested never makes it, and one that is
guards its making.
"""

Watch = Callable[[Sink], list[Removable]]
"""Hooks a place up to a sink and returns what takes the hooks off again."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One residual site, in static order (layer, attn < ffn)."""

    layer: int
    site: str
    watch_mix: Watch
    """→ MixView"""
    watch_branch: Watch | None
    """→ Tensor, the block's own output"""
    scale_branch: Callable[[float], Removable]
    """Multiplies the block's output from now on, until removed: a planted fault"""
    scale_res: Callable[[float], Removable] | None = None
    """The same for H_res, where there is one"""
    constrained: bool = False
    """Whether H_res is held doubly stochastic."""
    measure: Callable[[Tensor | None, Tensor | None], bool] | None = None
    """Has the site's kernels measure maps and streams while these flags on the device are not 0,
    and no more where they are None; False where its kernels cannot.
    """
    watch_written: Watch | None = None
    """→ WrittenView, of a site whose kernels measure"""


@dataclass(frozen=True, kw_only=True)
class RouterSite:
    layer: int
    module: nn.Module
    experts: int
    k: int
    hashed: bool
    watch: Watch
    """→ RouterView"""
    weight: Callable[[], Tensor]
    """(E, C), as it is now"""
    bias: Callable[[], Tensor | None]
    rescore: Callable[[Tensor, Tensor], Tensor]
    """(hidden, weight) → affinities before the bias"""
    chosen: Callable[[Any], Choice]
    """module output → what it chose"""
    replay: Callable[[Any, Tensor], Any]
    """(module output, ids) → the output with that choice and today's gate weights"""


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    layer: int
    watch_logits: Watch
    """→ 0-d Tensor, the largest attention logit of some sampled queries, worked out only for a sink
    that asks
    """


@dataclass(frozen=True, kw_only=True)
class ExpertSite:
    layer: int
    experts: int
    watch: list[Watch]
    """→ ActView; routed experts first, then the shared one"""
    gate_limit: float | None
    up_limit: float | None
    weights: Callable[[], dict[str, Tensor]]
    """gate, up, down as (E, in, out), x @ W, as they are now"""
    shared: Callable[[], dict[str, Tensor] | None]
    """The same of the shared expert, (1, in, out); None where there is none"""
    activation: Callable[[Tensor, Tensor], Tensor]
    """(gate, up) → what `down` takes, clamps and all"""
    row_tokens: Callable[[Tensor], Tensor]
    """expert ids (T, K) → the token of each row that the routed experts' ActView shows"""
    measure: Callable[[Tensor | None], object] | None = None
    """Has the kernels count while this flag on the device is not 0, and no more where it is None"""
    set_limit: Callable[[float | None], None] | None = None
    """Switches the clamp of gate and up; None for none"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything geodiag may look at in one model."""

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
    """The module behind the last block, if nothing from there on mixes the tokens of a sequence"""
    streams: int = 1
    has_stream_axis: bool = True
    """Whether the residual has a dimension for its streams, even for one."""
    watched: tuple[int, ...] | None = None
    """The layers that are recorded; None for all. Composites are products over all sites all the
    same.
    """
    missing: list[str] = field(default_factory=list)
    """What this model does not have, each as a sentence."""

    def watches(self, layer: int) -> bool:
        """Whether a layer is recorded."""
        return self.watched is None or layer in self.watched

    def summary(self) -> dict[str, Any]:
        """What was found, for the manifest."""
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


def on_output(module: nn.Module, read: Callable[[tuple, dict, Any], Any]) -> Watch:
    """Watches a module's forward; `read` takes (args, kwargs, output)."""

    def watch(sink: Sink) -> list[Removable]:
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            sink(lambda: read(args, kwargs, output))

        return [module.register_forward_hook(hook, with_kwargs=True)]

    return watch


def on_input(module: nn.Module, read: Callable[[tuple, dict], Any]) -> Watch:
    """Watches what a module is called with."""

    def watch(sink: Sink) -> list[Removable]:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            sink(lambda: read(args, kwargs))

        return [module.register_forward_pre_hook(hook, with_kwargs=True)]

    return watch


QUERIES = 64
"""Positions whose attention logits are looked at."""


def sampled_queries(positions: int, device: torch.device) -> Tensor:
    """`QUERIES` positions, evenly spaced, the last among them; all where there are no more."""
    return torch.linspace(0, positions - 1, min(QUERIES, positions), device=device).long()


def scaling(module: nn.Module, scaled: Callable[[Any, float], Any]) -> Callable[[float], Removable]:
    """A forward hook, first in line, that replaces the module's output by `scaled(output, factor)`."""

    def plant(factor: float) -> Removable:
        return register_first_hook(module, lambda _m, _a, output: scaled(output, factor))

    return plant


def register_first_hook(
    module: nn.Module, hook: Callable[[nn.Module, tuple, Any], Any]
) -> Removable:
    """A forward hook before all that are there.

    torch's own `prepend` leaves the hooks in one order for who calls them and in another for who
    counts them, and torch.compile before 2.13 counts: it would take one hook's variables for
    another's. Here both orders are the same.
    """
    handle = module.register_forward_hook(hook)
    hooks = module._forward_hooks
    for key in list(hooks)[:-1]:
        hooks[key] = hooks.pop(key)
    return handle
