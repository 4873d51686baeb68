"""Kernel tests: on a GPU where there is one, else through Triton's interpreter, on small shapes."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # As in the conftest above, which is not read where this folder is run by itself on a GPU
    # machine.
    os.environ["TRITON_INTERPRET"] = "1"

# Largest relative error (Frobenius, against float64) of any output or gradient, by the stream's
# type. bfloat16 itself rounds by 2e-3; the interpreter truncates, which doubles that, and gradients
# add two roundings.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def error() -> Callable[[Tensor, Tensor], float]:
    """‖a − b‖ / ‖b‖ in float64; NaN in either is no agreement, and nor is anything with a zero
    reference.
    """

    def relative(a: Tensor, b: Tensor) -> float:
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        assert a.shape == b.shape
        norm = b.norm()
        distance = float((a - b).norm() / norm) if norm > 0 else float(a.norm())
        return distance if distance == distance else float("inf")

    return relative


@pytest.fixture(scope="session")
def tolerance() -> dict[torch.dtype, float]:
    return TOLERANCE


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)
