"""The straight way to a kernel and the registered one are the same operation."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from geodiag.reference_models.kernels.autograd.mhc_pre import mhc_pre_linked
from geodiag.reference_models.kernels.autograd.sinkhorn import sinkhorn


def leaves(device):
    shapes = ((9, 4, 16), (64, 24), (3,), (24,))
    return [torch.randn(*s, device=device).div(4).requires_grad_() for s in shapes]


def test_direct_and_registered_calls_have_the_same_bits_and_gradients(device):
    inputs = leaves(device)
    registered = torch.ops.geodiag.mhc_pre(*inputs, 5, 1e-6, 1e-6, "columns-first", None, None)
    straight = mhc_pre_linked(*inputs, iterations=5).mix
    up = torch.randn(9, 16, device=device)
    for a, b in zip(straight[:5], registered[:5], strict=True):
        assert torch.equal(a, b)
    ours = torch.autograd.grad(straight.inner_TC, inputs, up)
    for a, b in zip(ours, torch.autograd.grad(registered[0], inputs, up), strict=True):
        assert torch.equal(a, b)
    other = mhc_pre_linked(*inputs, iterations=4).mix
    assert not torch.equal(other.res_TNN, registered[3])


def test_fake_tensors_launch_no_kernel():
    with FakeTensorMode():
        out = sinkhorn(torch.empty(7, 4, 4, requires_grad=True))
    assert out.shape == (7, 4, 4)
    assert out.requires_grad


def test_a_second_derivative_is_refused_not_zero(device):
    logits = torch.randn(3, 4, 4, device=device, requires_grad=True)
    up = torch.randn(3, 4, 4, device=device, requires_grad=True)
    first = torch.autograd.grad(sinkhorn(logits), logits, up, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
