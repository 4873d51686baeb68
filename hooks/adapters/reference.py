"""Adapter for geodiag's own reference transformer."""

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import (
    ActView,
    AttentionSite,
    Choice,
    ExpertSite,
    Layout,
    MixView,
    RouterSite,
    RouterView,
    Site,
    StatsRows,
    Watch,
    WrittenView,
)
from geodiag.hooks.adapters.module_hooks import on_input, on_output, output_scaling, sampled_queries
from geodiag.reference_models.attention import Attention, rotate
from geodiag.reference_models.kernels.reference import (
    Activated,
    Mix,
    Written,
    affinity,
    clamped_swiglu,
)
from geodiag.reference_models.kernels.select import REFERENCE, select
from geodiag.reference_models.kernels.stats_layout import (
    COUNTS_LAYOUT,
    MAPS_LAYOUT,
    STREAMS_LAYOUT,
    StatsLayout,
)
from geodiag.reference_models.mhc import HyperConnection, PlainResidual
from geodiag.reference_models.moe import ClampedSwiGLU, HashRouter, MoE, Router
from geodiag.reference_models.transformer import Transformer


def find(model: nn.Module) -> Layout | None:
    """Return the layout of a reference `Transformer`, also in a wrapper; None for other models."""
    own = next((m for m in model.modules() if isinstance(m, Transformer)), None)
    if own is None:
        return None
    sites, routers, experts = [], [], []
    for i, layer in enumerate(own.blocks):
        for name, connection, branch in (
            ("attn", layer.attn_hc, layer.attn),
            ("ffn", layer.ffn_hc, layer.moe),
        ):
            sites.append(_site(i, name, connection, branch))
        routers.append(_router(i, layer.moe.router))
        experts.append(_experts(i, layer.moe, own.config.swiglu_limit))
    plain = own.config.residual == "plain"
    return Layout(
        family=f"reference ({own.config.residual})",
        layers=list(own.blocks),
        sites=sites,
        routers=routers,
        experts=experts,
        attention=[_attention(i, layer.attn) for i, layer in enumerate(own.blocks)],
        watch_input=on_output(own.embed, lambda _a, _k, out: out),
        watch_end=on_input(own.read_out, lambda args, _: args[0]),
        tail=own.read_out,
        streams=own.config.streams,
        missing=["no hyper-connections: the residual is plain, so there are no H_res gains"]
        if plain
        else [],
    )


def _named(rows: Tensor | None, layout: StatsLayout) -> StatsRows | None:
    """Return the kernel's rows with the names of their columns."""
    return None if rows is None else StatsRows(rows, layout.names)


def _mix_view(x: Tensor, mix: Mix) -> MixView:
    stats = _named(mix.stats_PW, MAPS_LAYOUT)
    return MixView(x, mix.pre_TN, mix.post_TN, mix.res_TNN, mix.logits_TNN, stats)


def _written_view(x_TNC: Tensor, written: Written) -> WrittenView:
    assert written.stats_TBF is not None, "kernels measure while a flag is set"
    stats = StatsRows(written.stats_TBF, STREAMS_LAYOUT.names)
    return WrittenView(stats, elements=x_TNC.shape[-1] * x_TNC.shape[-2])


def _site(
    layer: int, name: str, connection: HyperConnection | PlainResidual, branch: nn.Module
) -> Site:
    attention = name == "attn"
    return Site(
        layer=layer,
        site=name,
        watch_mix=on_output(connection, lambda args, _, mix: _mix_view(args[0], mix)),
        watch_branch=on_output(branch, lambda _a, _k, out: out if attention else out.hidden_BSC),
        scale_branch=output_scaling(
            branch,
            lambda out, f: out * f if attention else out._replace(hidden_BSC=out.hidden_BSC * f),
        ),
        scale_res=output_scaling(
            connection, lambda mix, f: mix._replace(res_TNN=mix.res_TNN * f, stats_PW=None)
        )
        if isinstance(connection, HyperConnection)
        else None,
        constrained=isinstance(connection, HyperConnection) and connection.config.residual == "mhc",
        measure=lambda gains, streams: _measure(connection, gains, streams),
        watch_written=on_output(connection.write, lambda args, _, out: _written_view(args[0], out)),
    )


def _measure(connection: nn.Module, gains: Tensor | None, streams: Tensor | None) -> bool:
    """Set the flags of a site's kernels. Return whether its kernels can measure."""
    if not isinstance(connection, HyperConnection):
        return False
    connection.flag = gains
    connection.write.flag = streams
    return select(connection.config.kernels, connection.phi.device) is not REFERENCE


def _router(layer: int, router: Router) -> RouterSite:
    hashed = isinstance(router, HashRouter)
    return RouterSite(
        layer=layer,
        module=router,
        experts=len(router.weight),
        k=router.k,
        hashed=hashed,
        watch=on_output(
            router,
            lambda args, _, r: RouterView(
                args[0],
                r.scores_TE,
                None if hashed else router.balance,
                r.expert_ids_TK,
                r.weights_TK,
            ),
        ),
        weight=lambda: router.weight,
        bias=lambda: None if hashed else router.balance,
        rescore=affinity,
        chosen=lambda out: Choice(out.expert_ids_TK, out.weights_TK),
        replay=lambda out, ids: router.weighed(out.logits_TE, ids),
    )


def _attention(layer: int, attention: Attention) -> AttentionSite:
    """Return the attention site. Fused attention returns no logits, so those of some queries are
    computed beside it.
    """

    def largest(args: tuple, _: dict) -> Tensor:
        x_BSC, rotary = args
        at = sampled_queries(x_BSC.shape[1], x_BSC.device)
        q, k, _v = (
            attention.qkv(x_BSC).unflatten(-1, (3, attention.heads, attention.head_dim)).unbind(-3)
        )
        q, k = rotate(attention.q_norm(q), rotary)[:, at], rotate(attention.k_norm(k), rotary)
        logits_BHQS = (
            q.transpose(1, 2).float() @ k.permute(0, 2, 3, 1).float()
        ) * attention.head_dim**-0.5
        future = torch.arange(x_BSC.shape[1], device=at.device) > at.unsqueeze(-1)
        return logits_BHQS.masked_fill(future, -torch.inf).amax()

    return AttentionSite(layer=layer, watch_logits=on_input(attention, largest))


def _act(act: ClampedSwiGLU) -> Watch:
    def read(args: tuple, kwargs: dict, out: Activated) -> ActView:
        gate, up = args[0].chunk(2, -1)
        expert_A = args[1] if len(args) > 1 else kwargs.get("expert_A")
        return ActView(gate, up, out.out_AF, expert_A, _named(out.counts_E8, COUNTS_LAYOUT))

    return on_output(act, read)


def _experts(layer: int, moe: MoE, limit: float | None) -> ExpertSite:
    def weights() -> dict[str, Tensor]:
        gate, up = moe.experts.gate_up.detach().chunk(2, -1)
        return {"gate": gate, "up": up, "down": moe.experts.down.detach()}

    def shared() -> dict[str, Tensor] | None:
        if moe.shared is None:
            return None
        gate, up = moe.shared.gate_up.weight.detach().mT.chunk(2, -1)
        return {
            "gate": gate[None],
            "up": up[None],
            "down": moe.shared.down.weight.detach().mT[None],
        }

    def set_limit(to: float | None) -> None:
        for act in acts:
            act.limit = to

    def measure(flag: Tensor | None) -> None:
        for act in acts:
            act.flag = flag

    acts = [moe.experts.act] + ([moe.shared.act] if moe.shared is not None else [])
    return ExpertSite(
        layer=layer,
        experts=len(moe.experts.gate_up),
        module=moe.experts,
        watch=[_act(a) for a in acts],
        gate_limit=limit,
        up_limit=limit,
        weights=weights,
        shared=shared,
        activation=lambda gate, up: clamped_swiglu(torch.cat([gate, up], -1), limit),
        row_tokens=lambda ids: ids.flatten().sort(stable=True).indices // ids.shape[-1],
        measure=measure,
        set_limit=set_limit,
    )
