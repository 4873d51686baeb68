"""The expert block as a function: shared and routed experts at any input and any choice.

Every expert sees every token, and the choice only weighs: no sorting, nothing read on the host, and
the same sums in the same order for two choices that are compared. Meant for the few tokens of a
probe.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import ExpertSite

# J choices, T tokens, C channels, E experts, K experts per token, F expert dim

_AT_ONCE = 1 << 26
"""Weights that are held in full precision at a time."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products without TF32 and autocast: differences of nearly equal outputs are taken
    inside.
    """
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        products.fp32_precision = before


def gates(ids_TK: Tensor, weights_TK: Tensor, experts: int) -> Tensor:
    """A choice as the weight of every expert, (T, E); 0 for those not chosen."""
    dense = torch.zeros(len(ids_TK), experts, device=ids_TK.device, dtype=torch.float32)
    return dense.scatter_add_(1, ids_TK.long(), weights_TK.detach().float())


def expert_block(site: ExpertSite, x_TC: Tensor, gates_JTE: Tensor) -> Tensor:
    """(J, T, C): the block's output at `x`, for each of J choices. Computed in the type of `x`,
    summed in float32.
    """
    kind = torch.promote_types(x_TC.dtype, torch.float32)
    x, weights, shared = x_TC, site.weights(), site.shared()
    with full_precision(x.device):
        out = torch.zeros(len(gates_JTE), *x.shape, dtype=kind, device=x.device)
        if shared is not None:
            out += _outputs(site, x, shared).squeeze(0)
        some = max(1, _AT_ONCE // sum(w[0].numel() for w in weights.values()))
        for first in range(0, site.experts, some):
            some_weights = {name: w[first : first + some] for name, w in weights.items()}
            y_ETC = _outputs(site, x, some_weights)
            g_JTE = gates_JTE[..., first : first + some].to(kind)
            # A choice at a time: (E, T, C) is larger than all the rest.
            for out_TC, g_TE in zip(out, g_JTE, strict=True):
                out_TC += (g_TE.T.unsqueeze(-1) * y_ETC).sum(0)
    return out


def _outputs(site: ExpertSite, x_TC: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """(E, T, C): every expert at every token."""
    gate, up, down = (weights[name].detach().to(x_TC.dtype) for name in ("gate", "up", "down"))
    return site.activation(x_TC @ gate, x_TC @ up) @ down
