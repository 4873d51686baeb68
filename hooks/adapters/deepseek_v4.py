"""Adapter for transformers' DeepSeek-V4. Its `comb` is applied transposed, so H_res = combᵀ."""

from typing import Any

from torch import Tensor, nn

from geodiag.hooks.adapters.base import Choice, Layout, MixView, RouterSite, RouterView, Site
from geodiag.hooks.adapters.deepseek_v4_attention import attention_site
from geodiag.hooks.adapters.deepseek_v4_experts import expert_site
from geodiag.hooks.adapters.module_hooks import on_input, on_output, output_scaling

_NAME = "DeepseekV4Model"
"""Class name; `fully_shard` makes a subclass of it."""


def find(model: nn.Module) -> Layout | None:
    """Return the layout of a `DeepseekV4Model`, or of a head around it; None for other models.

    Does not import transformers.
    """
    own: Any = next(
        (m for m in model.modules() if _NAME in (c.__name__ for c in type(m).__mro__)), None
    )
    if own is None:
        return None
    layers = list(own.layers)
    sites = []
    for i, layer in enumerate(layers):
        sites.append(_site(i, "attn", layer.attn_hc, layer.self_attn))
        sites.append(_site(i, "ffn", layer.ffn_hc, layer.mlp))
    return Layout(
        family="deepseek_v4 (transformers)",
        layers=layers,
        sites=sites,
        routers=[_router(i, layer.mlp.gate) for i, layer in enumerate(layers)],
        experts=[expert_site(i, layer.mlp) for i, layer in enumerate(layers)],
        attention=[attention_site(i, layer.self_attn) for i, layer in enumerate(layers)],
        watch_input=on_output(own.embed_tokens, lambda _a, _k, out: out),
        watch_end=on_input(own.hc_head, lambda args, _: args[0]),
        streams=own.config.hc_mult,
    )


def _site(layer: int, name: str, connection: nn.Module, branch: nn.Module) -> Site:
    return Site(
        layer=layer,
        site=name,
        watch_mix=on_output(connection, _mix_view),
        watch_branch=on_output(
            branch, lambda _a, _k, out: out[0] if isinstance(out, tuple) else out
        ),
        scale_branch=output_scaling(branch, _scaled),
        scale_res=output_scaling(connection, lambda out, f: (out[0], out[1] * f, out[2])),
        constrained=True,
    )


def _mix_view(args: tuple, kwargs: dict, out: tuple) -> MixView:
    """The output is (post, comb, collapsed), and out_n = Σ_m comb[m, n] x_m: H_res = combᵀ."""
    streams = args[0] if args else kwargs["hidden_streams"]
    return MixView(streams, None, out[0], out[1].transpose(-1, -2))


def _scaled(out: Any, factor: float) -> Any:
    return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor


def _router(layer: int, gate: Any) -> RouterSite:
    hashed = not hasattr(gate, "e_score_correction_bias")

    def bias() -> Tensor | None:
        return None if hashed else gate.e_score_correction_bias

    def replay(out: tuple, ids: Tensor) -> tuple:
        # The gate weights of today's scores at the given ids, normalized as the router does.
        logits = out[0]
        chosen = gate.score_fn(logits).gather(1, ids)
        weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * gate.routed_scaling_factor, ids

    def view(args: tuple, kwargs: dict, out: tuple) -> RouterView:
        hidden = args[0] if args else kwargs["hidden_states"]
        logits, weights, ids = out
        return RouterView(
            hidden_TC=hidden.reshape(-1, hidden.shape[-1]),
            scores_TE=gate.score_fn(logits),
            bias_E=bias(),
            expert_ids_TK=ids,
            weights_TK=weights,
        )

    return RouterSite(
        layer=layer,
        module=gate,
        experts=gate.num_experts,
        k=gate.top_k,
        hashed=hashed,
        watch=on_output(gate, view),
        weight=lambda: gate.weight,
        bias=bias,
        rescore=lambda hidden, weight: gate.score_fn(hidden.to(weight.dtype) @ weight.T),
        chosen=lambda out: Choice(out[2], out[1]),
        replay=replay,
    )
