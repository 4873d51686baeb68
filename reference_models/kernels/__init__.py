"""The hot operations of the reference model, each in torch and in Triton.

`reference` has the definitions in torch, `device` the Triton code, `autograd` the launches and
gradients, `select` the choice between them.
"""

from typing import Literal

Kernels = Literal["auto", "reference", "triton"]
"""`auto` is Triton on a CUDA device, and the reference elsewhere."""
