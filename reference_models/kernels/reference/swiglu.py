"""The clamped gated activation in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from geodiag.reference_models.kernels.reference.results import Activated

# A rows (one token at one expert), F expert dim, E experts


def clamped_swiglu(gate_up_A2F: Tensor, limit: float | None = 10.0) -> Tensor:
    """silu(min(g, limit)) · clamp(u, ±limit); halves layout, gate clamped before SiLU (arXiv
    2606.19348).
    """
    gate, up = gate_up_A2F.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def expert_glu(
    gate_up_A2F: Tensor,
    limit: float | None = 10.0,
    ends_E: Tensor | None = None,
    flag: Tensor | None = None,
) -> Activated:
    """`clamped_swiglu` of rows sorted by expert, which end at `ends_E`; None for rows of one
    expert.

    Counts nothing on the way: `flag` is for kernels that do while it is not 0.
    """
    return Activated(clamped_swiglu(gate_up_A2F, limit))
