"""The read-out on the fused kernels: value and gradients of its definition."""

import pytest
import torch

from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.autograd import site


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_the_reference_s(device, error, tolerance, n, dtype):
    x = torch.randn(2, 5, n, 40, device=device).to(dtype).requires_grad_()
    phi = (torch.randn(n * 40, n, device=device) / 6).requires_grad_()
    alpha, bias = (torch.randn(k, device=device).requires_grad_() for k in (1, n))
    leaves = (x, phi, alpha, bias)
    wide = [v.detach().double().requires_grad_() for v in leaves]
    flat = wide[0].flatten(-2)
    rms = flat.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    gate = torch.sigmoid((flat @ wide[1]) * rms * wide[2] + wide[3]) + 1e-6
    want = (gate.unsqueeze(-1) * wide[0]).sum(-2)
    out = site.read_out(*leaves, 1e-6, 1e-6)
    up = torch.randn(want.shape, device=device).to(dtype)
    assert error(out, want) < tolerance[dtype]
    assert error(out.float().flip(-1), want) > 10 * tolerance[dtype]
    dx, dphi, *ours = torch.autograd.grad(out, leaves, up)
    *truth, dalpha, dbias = torch.autograd.grad(want, wide, up.double())
    # α's gradient is one number, a sum that may cancel: held against the bias's, which has the same
    # parts.
    for a, b in zip((dx, dphi, torch.cat(ours)), (*truth, torch.cat([dalpha, dbias])), strict=True):
        assert error(a, b) < 3 * tolerance[dtype]
    exact = reference.read_out(*(v.detach().float() for v in leaves), 1e-6, 1e-6)
    assert error(exact, want) < 1e-5
