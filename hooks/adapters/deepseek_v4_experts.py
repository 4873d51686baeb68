"""Experts of transformers' DeepSeek-V4: their pre-activations, weights and clamp.

The pre-activations of the routed experts exist only as the argument of the method `_apply_gate`,
which is called once, or once per expert. The adapter replaces the method on the instance while at
least one watch is active.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geodiag.hooks.adapters.base import ActView, ExpertSite, Removable, Sink, Watch

# T tokens, K experts per token, A assignments of tokens to experts, F expert dim

IN_TOKEN_ORDER = ("batched_mm",)
"""Experts implementations whose rows are ordered by token; the rows of all others are by expert."""

Piece = tuple[Tensor, Tensor]
"""Argument and result of one call of `_apply_gate`: pre-activations (…, 2F), activations (…, F)."""


def expert_site(layer: int, mlp: Any) -> ExpertSite:
    """Return the experts of one layer."""

    def weights() -> dict[str, Tensor]:
        gate, up = mlp.experts.gate_up_proj.detach().mT.chunk(2, -1)
        return {"gate": gate, "up": up, "down": mlp.experts.down_proj.detach().mT}

    def shared() -> dict[str, Tensor]:
        own = mlp.shared_experts
        named = {"gate": own.gate_proj, "up": own.up_proj, "down": own.down_proj}
        return {name: linear.weight.detach().mT[None] for name, linear in named.items()}

    def set_limit(limit: float | None) -> None:
        for module in (mlp.experts, mlp.shared_experts):
            module.limit = limit

    def activation(gate: Tensor, up: Tensor) -> Tensor:
        return type(mlp.experts)._apply_gate(mlp.experts, torch.cat([gate, up], -1))

    return ExpertSite(
        layer=layer,
        experts=mlp.experts.num_experts,
        module=mlp.experts,
        watch=[_watch_routed(mlp.experts), _watch_shared(mlp.shared_experts)],
        gate_limit=mlp.experts.limit,
        up_limit=mlp.experts.limit,
        weights=weights,
        shared=shared,
        activation=activation,
        row_tokens=lambda ids: _row_tokens(mlp.experts, ids),
        set_limit=set_limit,
    )


class _GateRecorder:
    """Replaces an experts module's `_apply_gate` and gives each call's tensors to all listeners."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.listeners: list[list[Piece]] = []

    def __call__(self, gate_up: Tensor) -> Tensor:
        act = type(self.experts)._apply_gate(self.experts, gate_up)
        for pieces in self.listeners:
            pieces.append((gate_up.detach(), act.detach()))
        return act


class _GateListener:
    """One listener. Removing the last one restores the class's own `_apply_gate`."""

    def __init__(self, experts: Any, pieces: list[Piece]) -> None:
        self.experts = experts
        self.pieces = pieces
        self.recorder: _GateRecorder = experts.__dict__.setdefault(
            "_apply_gate", _GateRecorder(experts)
        )
        self.recorder.listeners.append(pieces)

    def remove(self) -> None:
        self.recorder.listeners[:] = [p for p in self.recorder.listeners if p is not self.pieces]
        if not self.recorder.listeners:
            self.experts.__dict__.pop("_apply_gate", None)


def _watch_routed(experts: Any) -> Watch:
    def watch(sink: Sink) -> list[Removable]:
        pieces: list[Piece] = []

        def after_forward(_: nn.Module, args: tuple, kwargs: dict, __: Any) -> None:
            sink(lambda: _routed_view(experts, pieces, args, kwargs))
            pieces.clear()

        return [
            _GateListener(experts, pieces),
            experts.register_forward_pre_hook(lambda *_: pieces.clear()),
            experts.register_forward_hook(after_forward, with_kwargs=True),
        ]

    return watch


def _routed_view(experts: Any, pieces: list[Piece], args: tuple, kwargs: dict) -> ActView:
    """Return the activations of all assignments, and the expert of each."""
    expert_A = (args[1] if len(args) > 1 else kwargs["top_k_index"]).flatten()
    implementation = experts.config._experts_implementation
    if sum(len(gate_up) for gate_up, _ in pieces) != len(expert_A):
        raise RuntimeError(
            f"{implementation!r} does not show its activations; eager, grouped_mm and batched_mm do"
        )
    if implementation not in IN_TOKEN_ORDER:
        expert_A = expert_A.sort().values

    gate_ups, acts = zip(*pieces, strict=True)
    gate_up = torch.cat(gate_ups) if len(pieces) > 1 else gate_ups[0]
    act_AF = torch.cat(acts) if len(pieces) > 1 else acts[0]
    gate_AF, up_AF = gate_up.chunk(2, -1)
    return ActView(gate_AF, up_AF, act_AF, expert_A)


def _row_tokens(experts: Any, ids_TK: Tensor) -> Tensor:
    """Return the token of each row, in the order of the experts implementation."""
    implementation = experts.config._experts_implementation
    k = ids_TK.shape[-1]
    if implementation in IN_TOKEN_ORDER:
        return torch.arange(ids_TK.numel(), device=ids_TK.device) // k
    if implementation == "grouped_mm":
        return ids_TK.reshape(-1).sort().indices // k  # the same call as there: ties are alike
    return ids_TK.T.reshape(-1).sort(stable=True).indices % len(ids_TK)


def _watch_shared(mlp: Any) -> Watch:
    def watch(sink: Sink) -> list[Removable]:
        outputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _m, _a, out: outputs.__setitem__(name, out.detach())

        def view(args: tuple) -> ActView:
            gate = outputs["gate"].flatten(0, -2)
            up = outputs["up"].flatten(0, -2)
            return ActView(gate, up, args[0].detach().flatten(0, -2), None)

        def before_down(_: nn.Module, args: tuple) -> None:
            sink(lambda: view(args))
            outputs.clear()

        return [
            mlp.gate_proj.register_forward_hook(keep("gate")),
            mlp.up_proj.register_forward_hook(keep("up")),
            mlp.down_proj.register_forward_pre_hook(before_down),
        ]

    return watch
