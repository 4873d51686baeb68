"""A tiny DeepSeek-V4 of transformers', with hash layers, biting clamps and maps that are not
symmetric.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

from geodiag.hooks.monitor import Monitor

VOCAB, SEQUENCE, LIMIT, EXPERTS, K, STREAMS, LAYERS = 50, 12, 0.05, 6, 2, 4, 3


def model(
    implementation: str = "eager", checkpointing: bool = False, **changes: Any
) -> DeepseekV4ForCausalLM:
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "moe_intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "head_dim": 16,
        "q_lora_rank": 16,
        "num_experts_per_tok": K,
        "n_routed_experts": EXPERTS,
        "hc_mult": STREAMS,
        "swiglu_limit": LIMIT,
        "o_groups": 1,
        "o_lora_rank": 16,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "sliding_window": 8,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "use_cache": False,
    }
    torch.manual_seed(0)
    made = DeepseekV4ForCausalLM(DeepseekV4Config(**(options | changes)))
    made.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(1)
    for name, p in made.named_parameters():
        if "_hc." in name or "hc_head" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.5
    table = made.model.layers[0].mlp.gate.tid2eid
    table.copy_(
        torch.stack([torch.randperm(EXPERTS, generator=generator)[:K] for _ in range(VOCAB)])
    )
    if checkpointing:
        made.activation_checkpointing_enable({"use_reentrant": False})
    return made.train()


def tokens(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCAB, (4, SEQUENCE), generator=generator)


def optimizer(made: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(made.parameters(), lr=1e-2)


def batch(step: int) -> dict[str, Tensor]:
    ids = tokens(step)
    return {"input_ids": ids, "labels": ids}


def one_step(
    made: nn.Module, opt: torch.optim.Optimizer, inputs: dict, monitor: Monitor | None = None
) -> float:
    loss = made(**inputs).loss
    loss.backward()
    opt.step()
    opt.zero_grad()
    if monitor is not None:
        monitor.step(loss)
    return loss.item()
