"""Mixture of experts: a router, its experts, and the shared expert that every token passes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geodiag.reference_models.config import ModelConfig
from geodiag.reference_models.kernels import Kernels, reference
from geodiag.reference_models.kernels.reference import Activated, Routing
from geodiag.reference_models.kernels.select import select

# T tokens, C channels, E experts, K experts per token, A = T·K assignments sorted by expert, F
# expert dim

_HASH = 2654435761  # Knuth's multiplicative hash, 2^32 / φ


class MoEOutput(NamedTuple):
    hidden_BSC: Tensor
    routing: Routing


class Router(nn.Module):
    """√softplus affinities, K best after an aux-loss-free balancing bias (arXiv 2408.15664)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.k = config.experts_per_token
        self.scale = config.routed_scale
        self.kernels = config.kernels
        self.weight = nn.Parameter(torch.empty(config.experts, config.channels))
        self.balance: Tensor
        self.register_buffer("balance", torch.zeros(config.experts))

    def forward(self, hidden_TC: Tensor, token_ids_T: Tensor) -> Routing:
        logits = reference.router_logits(hidden_TC, self.weight)
        return select(self.kernels, hidden_TC.device).route(
            logits, self.balance, self.k, self.scale
        )

    def weighed(self, logits_TE: Tensor | None, expert_ids_TK: Tensor) -> Routing:
        """Return the current gate weights of a given choice of experts.

        Anticipatory routing replays older choices through this. It runs the same kernel as the
        router's own choice, so that equal ids give equal bits.
        """
        assert logits_TE is not None, "every router returns its logits"
        route = select(self.kernels, logits_TE.device).route
        return route(logits_TE, self.balance, self.k, self.scale, expert_ids_TK)


class HashRouter(Router):
    """Experts by a fixed hash of the token id; affinities only weight them (arXiv 2106.04426)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        token = torch.arange(config.vocab)[:, None] + layer * config.vocab + 1
        # High bits of the product: its low bits follow the id alone and are alike in every layer.
        first = ((token * _HASH) % (1 << 32) >> 16) % config.experts
        # Consecutive ids are distinct for every E.
        self.table: Tensor
        self.register_buffer(
            "table", (first + torch.arange(config.experts_per_token)) % config.experts
        )

    def forward(self, hidden_TC: Tensor, token_ids_T: Tensor) -> Routing:
        return self.weighed(
            reference.router_logits(hidden_TC, self.weight), self.table[token_ids_T]
        )


class ClampedSwiGLU(nn.Module):
    """The gated activation as a module, so that a hook can record its input and output."""

    def __init__(self, limit: float | None, kernels: Kernels = "reference") -> None:
        super().__init__()
        self.limit, self.kernels = limit, kernels
        self.flag: Tensor | None = None
        """An integer on the device, set by a monitor: fused kernels count while it is not 0."""

    def forward(
        self, gate_up_A2F: Tensor, expert_A: Tensor | None = None, ends_E: Tensor | None = None
    ) -> Activated:
        """Apply the activation to rows sorted by expert.

        `expert_A` (the expert of each row) and `ends_E` (the row after each expert's last) are for
        monitors and counting kernels; the result does not depend on them.
        """
        return select(self.kernels, gate_up_A2F.device).expert_glu(
            gate_up_A2F, self.limit, ends_E, self.flag
        )


class Experts(nn.Module):
    """All routed experts of a layer: tokens sorted by expert, a grouped matmul for each weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, c, f = config.experts, config.channels, config.expert_dim
        self.gate_up = nn.Parameter(torch.empty(e, c, 2 * f))
        self.down = nn.Parameter(torch.empty(e, f, c))
        self.act = ClampedSwiGLU(config.swiglu_limit, config.kernels)

    def forward(self, hidden_TC: Tensor, routing: Routing) -> Tensor:
        k = routing.expert_ids_TK.shape[-1]
        expert_A, order = routing.expert_ids_TK.flatten().sort(stable=True)
        starts = torch.arange(1, len(self.gate_up) + 1, device=expert_A.device)
        ends = torch.searchsorted(expert_A, starts, out_int32=True)
        token = order // k
        rows = F.grouped_mm(hidden_TC[token], self.gate_up, offs=ends)
        rows = F.grouped_mm(self.act(rows, expert_A, ends).out_AF, self.down, offs=ends)
        # Rows return to the tokens' order before the sum over K. Without concurrent additions to a
        # token, the result repeats bit for bit on a GPU.
        back = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        rows = rows[back] * routing.weights_TK.flatten().unsqueeze(-1).to(rows.dtype)
        return rows.unflatten(0, (-1, k)).sum(1)


class SharedExpert(nn.Module):
    """The expert that every token passes, clamped like the others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.shared_experts * config.expert_dim
        self.gate_up = nn.Linear(config.channels, 2 * width, bias=False)
        self.down = nn.Linear(width, config.channels, bias=False)
        self.act = ClampedSwiGLU(config.swiglu_limit, config.kernels)

    def forward(self, hidden_TC: Tensor) -> Tensor:
        return self.down(self.act(self.gate_up(hidden_TC)).out_AF)


class MoE(nn.Module):
    """(B, S, C) in; routed experts plus shared expert out, with the routing."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.router = HashRouter(config, layer) if layer < config.hash_layers else Router(config)
        self.experts = Experts(config)
        self.shared = SharedExpert(config) if config.shared_experts else None

    def forward(self, hidden_BSC: Tensor, token_ids_BS: Tensor) -> MoEOutput:
        flat = hidden_BSC.flatten(0, 1)
        routing = self.router(flat, token_ids_BS.flatten())
        out = self.experts(flat, routing)
        if self.shared is not None:
            out = out + self.shared(flat)
        return MoEOutput(out.view_as(hidden_BSC), routing)


def sequence_balance_loss(routing: Routing, sequences: int) -> Tensor:
    """Return Σ_e f_e·P_e of each sequence, mean over sequences (arXiv 2412.19437 eq. 17-20).

    The value is 1 for a perfectly even load. f counts the K best by score alone: the balancing bias
    and a replayed choice have no effect on it.
    """
    scores = routing.scores_TE.unflatten(0, (sequences, -1))
    k, experts = routing.expert_ids_TK.shape[-1], scores.shape[-1]
    share = scores / scores.sum(-1, keepdim=True)
    picked = torch.zeros_like(scores).scatter(-1, scores.detach().topk(k, dim=-1).indices, 1.0)
    frequency = picked.mean(1) * experts / k
    return (frequency * share.mean(1)).sum(-1).mean()


def loads(routing: Routing) -> Tensor:
    """Return the number of assignments of each expert, (E,)."""
    ids = routing.expert_ids_TK.flatten()
    return torch.zeros(routing.scores_TE.shape[-1], device=ids.device).index_add(
        0, ids, torch.ones_like(ids, dtype=torch.float32)
    )


@torch.no_grad()
def nudge_balance(router: Router, load_E: Tensor, speed: float) -> None:
    """Update the balancing bias after a step (arXiv 2408.15664).

    Overloaded experts lose `speed`, others gain it.
    """
    router.balance += speed * torch.sign(load_E.mean() - load_E)
