"""The clamped gated activation in plain torch."""

import torch.nn.functional as F
from torch import Tensor

from geodiag.reference_models.kernels.reference.results import Activated

# A rows (one token at one expert), F expert dim, E experts


def clamped_swiglu(gate_up_A2F: Tensor, limit: float | None = 10.0) -> Tensor:
    """Return silu(min(g, limit)) · clamp(u, ±limit) (arXiv 2606.19348).

    The first half of the columns is the gate, the second half is up. The clamp stops an extreme
    activation from growing through the product of the two.
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
    """`clamped_swiglu` of rows sorted by expert. `ends_E` and `flag` have no effect here.

    `ends_E` is the row after each expert's last, None for rows of one expert; the fused kernel
    counts clamp hits for each expert while `flag` is not 0.
    """
    return Activated(clamped_swiglu(gate_up_A2F, limit))
