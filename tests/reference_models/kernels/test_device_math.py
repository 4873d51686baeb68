"""Exponentials and quotients on the device against float64, where numbers end too."""

import pytest
import torch
import triton
import triton.language as tl

from geodiag.reference_models.kernels.device.math import exp, inverse, sigmoid

ERROR = 1e-6
"""Relative, of values that float32 holds as normal numbers; an argument of eˣ near 80 is itself
rounded by 4e-6.
"""


@triton.jit
def _all(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, exp(x))
    tl.store(out_ptr + SIZE + i, inverse(x))
    tl.store(out_ptr + 2 * SIZE + i, sigmoid(x))


def measured(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(3, len(x), device=x.device)
    _all[(1,)](x, out, SIZE=len(x))
    return out


@pytest.fixture
def values(device: str) -> torch.Tensor:
    return torch.randn(256, device=device) * 6


def worst(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() / truth - 1).abs().max())


def test_results_are_exact_to_the_last_digits_of_float32(values: torch.Tensor) -> None:
    ours, x = measured(values), values.double()
    assert worst(ours[0], x.exp()) < 4 * ERROR
    assert worst(ours[2], 1 / (1 + (-x).exp())) < 4 * ERROR
    assert worst(measured(values.abs())[1], 1 / x.abs()) < ERROR


def test_an_error_of_one_bfloat16_step_exceeds_the_tolerance(values: torch.Tensor) -> None:
    x = values.double()
    assert worst(measured(values)[2], 1 / (1 + (-x * (1 + 1 / 256)).exp())) > 1000 * ERROR


def test_values_at_the_limits_of_float32(device: str) -> None:
    inf, nan = float("inf"), float("nan")
    ends = torch.tensor([inf, -inf, nan, 0.0, 200.0, -200.0, 1e-30, 1e30], device=device)
    e, over, s = measured(ends).cpu().tolist()
    assert e[:2] == [inf, 0]
    assert e[3:6] == [1, inf, 0]
    assert (over[0], over[3]) == (0, inf)
    assert over[6:] == pytest.approx([1e30, 1e-30])
    assert s[:2] == [1, 0]
    assert s[3:6] == pytest.approx([0.5, 1, 0])
    assert all(v[2] != v[2] for v in (e, over, s)), "NaN stays NaN"
