"""The expert block as a function: shared and routed experts at any input and any choice.

Every expert is applied to every token, and the choice only sets the weights of the sum. This needs
no sorting and reads nothing on the host, and two choices that are compared sum the same terms in
the same order. It is meant for the few tokens of a probe.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import ExpertSite

# J choices, T tokens, C channels, E experts, K experts per token, F expert dim

_AT_ONCE = 1 << 26
"""Number of weight elements that are converted to full precision at a time."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Context with float32 matrix products: no TF32, no autocast, no gradients.

    Probes subtract nearly equal outputs, and rounding would dominate the difference.
    """
    matmul = torch.backends.cuda.matmul
    precision_before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        matmul.fp32_precision = precision_before


def gates(ids_TK: Tensor, weights_TK: Tensor, experts: int) -> Tensor:
    """Return a choice as one weight per expert, (T, E); 0 for experts that were not chosen."""
    dense = torch.zeros(len(ids_TK), experts, device=ids_TK.device, dtype=torch.float32)
    return dense.scatter_add_(1, ids_TK.long(), weights_TK.detach().float())


def expert_block(site: ExpertSite, x_TC: Tensor, gates_JTE: Tensor) -> Tensor:
    """Return the block's output at `x` for each of J choices, (J, T, C).

    Experts are computed in the dtype of `x` and summed in float32 or wider.
    """
    # F(x; g) = E_shared(x) + Σ_e g_e E_e(x), with E_e(x) = act(x W_gate, x W_up) W_down.
    dtype = torch.promote_types(x_TC.dtype, torch.float32)
    weights = site.weights()
    shared = site.shared()
    with full_precision(x_TC.device):
        out_JTC = torch.zeros(len(gates_JTE), *x_TC.shape, dtype=dtype, device=x_TC.device)
        if shared is not None:
            out_JTC += _outputs(site, x_TC, shared).squeeze(0)

        elements_per_expert = sum(w[0].numel() for w in weights.values())
        count = max(1, _AT_ONCE // elements_per_expert)
        for first in range(0, site.experts, count):
            chunk = {name: w[first : first + count] for name, w in weights.items()}
            y_ETC = _outputs(site, x_TC, chunk)
            gates_chunk_JTE = gates_JTE[..., first : first + count].to(dtype)
            # One choice at a time: a (J, E, T, C) tensor would be J times the memory of the rest.
            for out_TC, gates_TE in zip(out_JTC, gates_chunk_JTE, strict=True):
                out_TC += (gates_TE.T.unsqueeze(-1) * y_ETC).sum(0)
    return out_JTC


def _outputs(site: ExpertSite, x_TC: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Return every expert's output at every token, (E, T, C)."""
    gate, up, down = (weights[name].detach().to(x_TC.dtype) for name in ("gate", "up", "down"))
    return site.activation(x_TC @ gate, x_TC @ up) @ down
