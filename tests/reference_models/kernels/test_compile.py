"""torch.compile, CUDA graphs and torch's own checks of custom operators."""

import pytest
import torch

from geodiag.reference_models.kernels.autograd.mhc_post import mhc_post_linked
from geodiag.reference_models.kernels.autograd.mhc_pre import mhc_pre_linked
from geodiag.reference_models.kernels.autograd.sinkhorn import sinkhorn
from geodiag.reference_models.kernels.autograd.swiglu import clamped_swiglu


def block(x, phi, alpha, bias, weight):
    """A site around a gated block."""
    before = mhc_pre_linked(x, phi, alpha, bias)
    branch = clamped_swiglu(before.mix.inner_TC @ weight)
    out, _ = mhc_post_linked(x, branch, before.mix.post_TN, before.mix.res_TNN, before.link)
    return out, sinkhorn(before.mix.logits_TNN)


def leaves(device, tokens=9, c=16):
    return [
        torch.randn(tokens, 4, c, device=device, requires_grad=True),
        (torch.randn(4 * c, 24, device=device) / 8).requires_grad_(),
        torch.ones(3, device=device, requires_grad=True),
        torch.randn(24, device=device, requires_grad=True),
        (torch.randn(c, 2 * c, device=device) / 4).requires_grad_(),
    ]


def gradients(function, inputs, up):
    out, maps = function(*inputs)
    return [out, maps, *torch.autograd.grad((out, maps), inputs, up)]


def test_compiles_whole_and_gives_the_eager_numbers(device, error):
    inputs = leaves(device)
    up = torch.randn(9, 4, 16, device=device), torch.randn(9, 4, 4, device=device)
    compiled = torch.compile(
        block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    for ours, eager in zip(
        gradients(compiled, inputs, up), gradients(block, inputs, up), strict=True
    ):
        assert error(ours, eager) < 1e-5


def test_torch_s_own_checks_of_the_operators_pass(device):
    logits = torch.randn(3, 4, 4, device=device, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.geodiag.sinkhorn.default, (logits, 5, 0.0, "columns-first"), test_utils=checks
    )
    x, phi, alpha, bias, _ = leaves(device)
    arguments = (x, phi, alpha, bias, 5, 1e-6, 1e-6, "columns-first", None, None)
    torch.library.opcheck(torch.ops.geodiag.mhc_pre.default, arguments, test_utils=checks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_replays_with_new_numbers(error):
    inputs = leaves("cuda", 65, 64)
    up = torch.randn(65, 4, 64, device="cuda"), torch.randn(65, 4, 4, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(block, inputs, up)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(block, inputs, up)
    with torch.no_grad():
        for leaf in inputs:
            leaf.copy_(torch.randn_like(leaf) / 8)
    graph.replay()
    for ours, eager in zip(captured, gradients(block, inputs, up), strict=True):
        assert error(ours, eager) < 1e-6
