"""The reference transformer: embedding, layers of two sites each, read-out, head."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geodiag.reference_models.attention import Attention, rotary_table
from geodiag.reference_models.config import ModelConfig
from geodiag.reference_models.kernels.reference import Projected, Routing
from geodiag.reference_models.mhc import HyperConnection, PlainResidual, ReadOut
from geodiag.reference_models.moe import MoE, sequence_balance_loss
from geodiag.reference_models.norm import RMSNorm
from geodiag.reference_models.recompute import KEPT, Kept, Recomputed, block_length


class Output(NamedTuple):
    logits_BSV: Tensor
    routings: tuple[Routing, ...]
    """One for each layer: the choice that was used, for balancing and monitoring."""


class Loss(NamedTuple):
    total: Tensor
    """The value to differentiate."""
    token: Tensor
    """Cross-entropy in nats/token."""
    per_sequence_B: Tensor


class Layer(nn.Module):
    """Attention site, then feed-forward site."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_hc = _connection(config, 2 * layer)
        self.attn_norm = RMSNorm(config.channels, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ffn_hc = _connection(config, 2 * layer + 1)
        self.ffn_norm = RMSNorm(config.channels, eps=config.norm_eps)
        self.moe = MoE(config, layer)

    def forward(
        self,
        x_BSNC: Tensor,
        token_ids_BS: Tensor,
        rotary: Tensor,
        run: Kept = KEPT,
        projected: Projected | None = None,
        next_phi: Tensor | None = None,
    ) -> tuple[Tensor, Routing, Projected | None]:
        """Run both sites. `run` decides what is kept for the backward and what is computed again.

        `projected` comes from the previous layer. `next_phi` is φ of the next layer's first site,
        by which this layer's last kernel projects the streams.
        """
        mix, hidden = run.before(self.attn_hc, self.attn_norm, x_BSNC, projected)
        branch = run.inside(self.attn, hidden, rotary)
        x_BSNC, projected, _ = run.after(self.attn_hc, x_BSNC, branch, mix, self.ffn_hc.next_phi)
        mix, hidden = run.before(self.ffn_hc, self.ffn_norm, x_BSNC, projected)
        out = run.inside(self.moe, hidden, token_ids_BS)
        x_BSNC, projected, _ = run.after(self.ffn_hc, x_BSNC, out.hidden_BSC, mix, next_phi)
        return x_BSNC, out.routing, projected


def _connection(config: ModelConfig, site: int) -> HyperConnection | PlainResidual:
    return PlainResidual() if config.residual == "plain" else HyperConnection(config, site)


class Transformer(nn.Module):
    """Decoder-only MoE transformer with `plain`, `hc` or `mhc` residual streams."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.channels)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.read_out = ReadOut(config)
        self.norm = RMSNorm(config.channels, eps=config.norm_eps)
        self.head = nn.Linear(config.channels, config.vocab, bias=False)
        self.rotary: Tensor
        table = rotary_table(config.sequence, config.head_dim, config.rope_theta)
        self.register_buffer("rotary", table, persistent=False)
        self.reset()
        self._to_stream_type()

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise every weight; output projections are scaled down by depth."""
        std, deep = self.config.init_std, self.config.init_std / (2 * self.config.layers) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(
                    p, std=deep if name.endswith((".out.weight", ".down.weight", ".down")) else std
                )
        for m in self.modules():
            if isinstance(m, HyperConnection | ReadOut) and not self.head.weight.is_meta:
                m.reset()

    def _to_stream_type(self) -> None:
        """Convert matrices and embedding to the stream's type.

        Routers, hyper-connections and norms stay float32.
        """
        if self.config.dtype == "bfloat16":
            for name, p in self.named_parameters():
                small = (
                    p.dim() == 1
                    or "_hc." in name
                    or ".router." in name
                    or name.startswith("read_out.")
                )
                if not small:
                    p.data = p.data.to(torch.bfloat16)

    @property
    def blocks(self) -> list[Layer]:
        """`layers`, typed."""
        return [m for m in self.layers if isinstance(m, Layer)]

    def forward(self, token_ids_BS: Tensor) -> Output:
        """Return logits (B, S, V) of token ids (B, S).

        Raises ValueError for a sequence longer than `config.sequence`.
        """
        if token_ids_BS.shape[1] > self.config.sequence:
            raise ValueError(
                f"sequence {token_ids_BS.shape[1]} is longer than "
                f"config.sequence {self.config.sequence}"
            )
        x = self.embed(token_ids_BS).unsqueeze(-2).expand(-1, -1, self.config.streams, -1)
        routings, projected = [], None
        next_phis = [block.attn_hc.next_phi for block in self.blocks[1:]] + [None]
        # Under torch.compile the partitioner decides what is kept, and recomputes the light parts.
        differentiated = torch.is_grad_enabled()
        forgets = (
            self.config.recompute == "mhc" and differentiated and not torch.compiler.is_compiling()
        )
        length, run = block_length(self.config.streams, len(self.layers)), KEPT
        for i, layer in enumerate(self.layers):
            if self.config.recompute == "layers" and differentiated:
                arguments = (token_ids_BS, self.rotary, KEPT, projected, next_phis[i])
                x, routing, projected = checkpoint(layer, x, *arguments, use_reentrant=False)
            else:
                run = Recomputed(x, projected) if forgets and i % length == 0 else run
                x, routing, projected = layer(
                    x, token_ids_BS, self.rotary, run, projected, next_phis[i]
                )
            routings.append(routing)
        return Output(self.head(self.norm(self.read_out(x))), tuple(routings))

    def loss(self, output: Output, targets_BS: Tensor) -> Loss:
        """Return the cross-entropy, and its sum with the balance loss of the learned routers."""
        each = F.cross_entropy(
            output.logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), reduction="none"
        )
        each = each.view_as(targets_BS)
        token = each.mean()
        learned = output.routings[self.config.hash_layers :]
        balance = sum(
            (sequence_balance_loss(r, len(targets_BS)) for r in learned), start=token.new_zeros(())
        )
        return Loss(
            token + self.config.balance_weight * balance, token.detach(), each.detach().mean(1)
        )
