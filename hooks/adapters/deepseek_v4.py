"""Adapter for transformers' DeepSeek-V4: its `comb` is applied transposed, so H_res = combᵀ."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import (
    ActView,
    Choice,
    ExpertSite,
    Layout,
    MixView,
    Removable,
    RouterSite,
    RouterView,
    Sink,
    Site,
    Watch,
    on_input,
    on_output,
    scaling,
)
from geodiag.hooks.adapters.deepseek_v4_attention import attention_site

IN_TOKEN_ORDER = ("batched_mm",)
"""Experts implementations whose rows stand in the order of the tokens; in the others they stand by
expert.
"""

_NAME = "DeepseekV4Model"
"""Also of what `fully_shard` makes of it, a subclass."""


def find(model: nn.Module) -> Layout | None:
    """The layout of a `DeepseekV4Model` or of a head around it; None for other models. Imports no
    transformers.
    """
    own: Any = next(
        (m for m in model.modules() if _NAME in (c.__name__ for c in type(m).__mro__)), None
    )
    if own is None:
        return None
    layers = list(own.layers)
    sites = []
    for i, layer in enumerate(layers):
        for name, connection, branch in (
            ("attn", layer.attn_hc, layer.self_attn),
            ("ffn", layer.ffn_hc, layer.mlp),
        ):
            sites.append(
                Site(
                    layer=i,
                    site=name,
                    watch_mix=on_output(
                        connection,
                        # post, comb, collapsed; out_n = Σ_m comb[m, n] x_m
                        lambda args, kwargs, out: MixView(
                            args[0] if args else kwargs["hidden_streams"],
                            None,
                            out[0],
                            out[1].transpose(-1, -2),
                        ),
                    ),
                    watch_branch=on_output(
                        branch, lambda _a, _k, out: out[0] if isinstance(out, tuple) else out
                    ),
                    scale_branch=scaling(
                        branch,
                        lambda out, f: (
                            (out[0] * f, *out[1:]) if isinstance(out, tuple) else out * f
                        ),
                    ),
                    scale_res=scaling(connection, lambda out, f: (out[0], out[1] * f, out[2])),
                    constrained=True,
                )
            )
    return Layout(
        family="deepseek_v4 (transformers)",
        layers=layers,
        sites=sites,
        routers=[_router(i, layer.mlp.gate) for i, layer in enumerate(layers)],
        experts=[_experts(i, layer.mlp) for i, layer in enumerate(layers)],
        watch_input=on_output(own.embed_tokens, lambda _a, _k, out: out),
        watch_end=on_input(own.hc_head, lambda args, _: args[0]),
        streams=own.config.hc_mult,
        attention=[attention_site(i, layer.self_attn) for i, layer in enumerate(layers)],
    )


def _router(layer: int, gate: Any) -> RouterSite:
    hashed = not hasattr(gate, "e_score_correction_bias")

    def replay(out: tuple, ids: Tensor) -> tuple:
        logits = out[0]
        chosen = gate.score_fn(logits).gather(1, ids)
        weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * gate.routed_scaling_factor, ids

    def read(args: tuple, kwargs: dict, out: tuple) -> RouterView:
        hidden = args[0] if args else kwargs["hidden_states"]
        bias = None if hashed else gate.e_score_correction_bias
        return RouterView(
            hidden.reshape(-1, hidden.shape[-1]), gate.score_fn(out[0]), bias, out[2], out[1]
        )

    return RouterSite(
        layer=layer,
        module=gate,
        experts=gate.num_experts,
        k=gate.top_k,
        hashed=hashed,
        watch=on_output(gate, read),
        weight=lambda: gate.weight,
        bias=lambda: None if hashed else gate.e_score_correction_bias,
        rescore=lambda hidden, weight: gate.score_fn(hidden.to(weight.dtype) @ weight.T),
        chosen=lambda out: Choice(out[2], out[1]),
        replay=replay,
    )


class _Gated:
    """Stands in for an experts module's `_apply_gate`, which sees the pre-activations, and tells
    every listener.
    """

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.listeners: list[list[tuple[Tensor, Tensor]]] = []

    def __call__(self, gate_up: Tensor) -> Tensor:
        act = type(self.experts)._apply_gate(self.experts, gate_up)
        for pieces in self.listeners:
            pieces.append((gate_up.detach(), act.detach()))
        return act


class _Listening:
    """One listener; with the last of them the class's own `_apply_gate` shows again."""

    def __init__(self, experts: Any, pieces: list) -> None:
        self.experts, self.pieces = experts, pieces
        self.gated: _Gated = experts.__dict__.setdefault("_apply_gate", _Gated(experts))
        self.gated.listeners.append(pieces)

    def remove(self) -> None:
        self.gated.listeners[:] = [p for p in self.gated.listeners if p is not self.pieces]
        if not self.gated.listeners:
            self.experts.__dict__.pop("_apply_gate", None)


def _watch_experts(experts: Any) -> Watch:
    """The pre-activations exist only as the argument of `_apply_gate`: called once, or once an
    expert in order.
    """

    def watch(sink: Sink) -> list[Removable]:
        pieces: list[tuple[Tensor, Tensor]] = []

        def view(args: tuple, kwargs: dict) -> ActView:
            ids = (args[1] if len(args) > 1 else kwargs["top_k_index"]).flatten()
            way = experts.config._experts_implementation
            if sum(len(ins) for ins, _ in pieces) != len(ids):
                raise RuntimeError(
                    f"{way!r} does not show its activations; eager, grouped_mm and batched_mm do"
                )
            if way not in IN_TOKEN_ORDER:
                ids = ids.sort().values
            ins, outs = (
                torch.cat(t) if len(pieces) > 1 else t[0] for t in zip(*pieces, strict=True)
            )
            gate, up = ins.chunk(2, -1)
            return ActView(gate, up, outs, ids)

        def finish(_: nn.Module, args: tuple, kwargs: dict, __: Any) -> None:
            sink(lambda: view(args, kwargs))
            pieces.clear()

        return [
            _Listening(experts, pieces),
            experts.register_forward_pre_hook(lambda *_: pieces.clear()),
            experts.register_forward_hook(finish, with_kwargs=True),
        ]

    return watch


def _row_tokens(experts: Any, ids_TK: Tensor) -> Tensor:
    """The order in which each implementation takes the assignments."""
    way, k = experts.config._experts_implementation, ids_TK.shape[-1]
    if way in IN_TOKEN_ORDER:
        return torch.arange(ids_TK.numel(), device=ids_TK.device) // k
    if way == "grouped_mm":
        return ids_TK.reshape(-1).sort().indices // k  # the very call it makes, so ties fall alike
    return ids_TK.T.reshape(-1).sort(stable=True).indices % len(ids_TK)


def _watch_shared(mlp: Any) -> Watch:
    def watch(sink: Sink) -> list[Removable]:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _m, _a, out: seen.__setitem__(name, out.detach())

        def view(args: tuple) -> ActView:
            act = args[0].detach().flatten(0, -2)
            return ActView(seen["gate"].flatten(0, -2), seen["up"].flatten(0, -2), act, None)

        def finish(_: nn.Module, args: tuple) -> None:
            sink(lambda: view(args))
            seen.clear()

        return [
            mlp.gate_proj.register_forward_hook(keep("gate")),
            mlp.up_proj.register_forward_hook(keep("up")),
            mlp.down_proj.register_forward_pre_hook(finish),
        ]

    return watch


def _experts(layer: int, mlp: Any) -> ExpertSite:
    def weights() -> dict[str, Tensor]:
        gate, up = mlp.experts.gate_up_proj.detach().mT.chunk(2, -1)
        return {"gate": gate, "up": up, "down": mlp.experts.down_proj.detach().mT}

    def shared() -> dict[str, Tensor]:
        own = mlp.shared_experts
        named = {"gate": own.gate_proj, "up": own.up_proj, "down": own.down_proj}
        return {name: linear.weight.detach().mT[None] for name, linear in named.items()}

    def set_limit(to: float | None) -> None:
        for place in (mlp.experts, mlp.shared_experts):
            place.limit = to

    return ExpertSite(
        layer=layer,
        experts=mlp.experts.num_experts,
        watch=[_watch_experts(mlp.experts), _watch_shared(mlp.shared_experts)],
        gate_limit=mlp.experts.limit,
        up_limit=mlp.experts.limit,
        weights=weights,
        shared=shared,
        activation=lambda gate, up: type(mlp.experts)._apply_gate(
            mlp.experts, torch.cat([gate, up], -1)
        ),
        row_tokens=lambda ids: _row_tokens(mlp.experts, ids),
        set_limit=set_limit,
    )
