"""RMS normalisation whose float32 weight fits any stream type."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm in the type of its input.

    With a float32 weight, torch would normalise a bfloat16 stream on a slow path.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, None, self.eps) * self.weight.to(x.dtype)
