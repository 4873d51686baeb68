"""The stand-alone Sinkhorn kernel against its float64 definition."""

import pytest
import torch

from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.autograd.sinkhorn import sinkhorn

TOLERANCE = 1e-5


def run(project, logits, upstream, **options):
    logits = logits.clone().requires_grad_()
    out = project(logits, **options)
    return out.detach(), torch.autograd.grad(out, logits, upstream.to(out.dtype))[0]


def both(device, n, tokens=21, scale=1.0, **options):
    logits = scale * torch.randn(tokens, n, n, device=device)
    upstream = torch.randn(tokens, n, n, device=device)
    return run(sinkhorn, logits, upstream, **options), run(
        reference.sinkhorn, logits.double(), upstream, **options
    )


@pytest.mark.parametrize("order", ["columns-first", "rows-first"])
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_value_and_gradient_are_the_definition_s(device, error, n, scale, order):
    ours, truth = both(device, n, scale=scale, order=order)
    assert error(ours[0], truth[0]) < TOLERANCE
    assert error(ours[1], truth[1]) < TOLERANCE


@pytest.mark.parametrize(("iterations", "eps"), [(1, 0.0), (2, 1e-6), (7, 1e-3), (30, 0.0)])
def test_any_number_of_iterations_and_any_eps(device, error, iterations, eps):
    ours, truth = both(device, 4, scale=3.0, iterations=iterations, eps=eps)
    assert error(ours[0], truth[0]) < TOLERANCE
    assert error(ours[1], truth[1]) < TOLERANCE


def test_of_one_stream_the_map_is_one_and_has_no_gradient(device):
    out, grad = run(
        sinkhorn, torch.randn(5, 1, 1, device=device), torch.randn(5, 1, 1, device=device)
    )
    assert torch.equal(out, torch.ones_like(out))
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    "twin", ["zero gradient", "transposed", "gradient of the last iteration only"]
)
def test_wrong_results_exceed_the_tolerance(device, error, twin):
    logits = 3 * torch.randn(21, 4, 4, device=device)
    upstream = torch.randn(21, 4, 4, device=device)
    value, grad = run(reference.sinkhorn, logits.double(), upstream)
    if twin == "zero gradient":
        assert error(torch.zeros_like(grad), grad) > 100 * TOLERANCE
    elif twin == "transposed":
        assert error(sinkhorn(logits).mT, value) > 100 * TOLERANCE
    else:
        # A popular shortcut: backward through the final matrix as if it had come from one pair of
        # half steps.
        wrong = run(lambda v: reference.sinkhorn(v, iterations=1), value.log(), upstream)[1]
        assert error(wrong, grad) > 100 * TOLERANCE


def test_nan_in_nan_out_and_only_in_its_own_token(device):
    logits = torch.randn(9, 4, 4, device=device)
    logits[3, 1, 2] = float("nan")
    out, grad = run(sinkhorn, logits, torch.randn(9, 4, 4, device=device))
    for result in (out, grad):
        assert result[3].isnan().any()
        assert result[torch.arange(9, device=device) != 3].isfinite().all()


def test_infinite_logits_are_not_a_plausible_map(device):
    logits = torch.randn(4, 4, 4, device=device)
    logits[1, 2, 2] = float("inf")
    assert sinkhorn(logits)[1].isnan().any()


def test_leading_shape_is_kept_and_zero_tokens_are_accepted(device):
    assert sinkhorn(torch.randn(2, 3, 4, 4, device=device)).shape == (2, 3, 4, 4)
    assert sinkhorn(torch.randn(0, 4, 4, device=device)).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((3, 3, 3), {}), ((3, 4, 2), {}), ((3, 4, 4), {"iterations": 0}), ((3, 4, 4), {"order": "x"})],
)
def test_unsupported_input_is_an_error_that_names_it(device, shape, options):
    with pytest.raises(ValueError, match=r"N one of|iterations|order"):
        sinkhorn(torch.randn(shape, device=device), **options)
