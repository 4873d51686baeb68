"""Sinkhorn: what it projects onto, what twenty iterations leave, and its hand-written backward."""

import math

import pytest
import torch
from torch import Tensor

from geodiag.reference_models.kernels.reference import sinkhorn
from tests.reference_models.close import error

SIDES = {"columns-first": (-2, -1), "rows-first": (-1, -2)}
TOLERANCE = 1e-9


def plain(logits: Tensor, iterations: int, eps: float, order: str) -> Tensor:
    """The iterations as written in the paper, differentiated by autograd."""
    first, second = SIDES[order]
    m = torch.softmax(logits, first) + eps
    m = m / (m.sum(second, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(first, keepdim=True) + eps)
        m = m / (m.sum(second, keepdim=True) + eps)
    return m


def logits(scale: float, tokens: int = 50, n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(int(10 * scale))
    return scale * torch.randn(tokens, n, n, generator=generator, dtype=torch.float64)


def both(scale: float, order: str, eps: float) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradient of ours, and of autograd through the plain iterations, under the same
    random upstream.
    """
    upstream = torch.randn(
        50, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    found = []
    for function in (lambda z: sinkhorn(z, 20, eps, order), lambda z: plain(z, 20, eps, order)):
        z = logits(scale).requires_grad_()
        out = function(z)
        found.append([out, *torch.autograd.grad(out, z, upstream)])
    return found[0], found[1]


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("order", SIDES)
@pytest.mark.parametrize("scale", [0.1, 1, 3, 6])
def test_output_and_backward_are_those_of_autograd_through_the_plain_iterations(
    scale: float, order: str, eps: float
) -> None:
    for a, b in zip(*both(scale, order, eps), strict=True):
        assert error(a, b) < TOLERANCE


@pytest.mark.parametrize("order", SIDES)
@pytest.mark.parametrize("scale", [1, 6])
def test_the_backward_agrees_with_finite_differences(scale: float, order: str) -> None:
    z = logits(scale, tokens=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: sinkhorn(z, 5, 1e-6, order), (z,), eps=1e-6, atol=1e-7, rtol=1e-5
    )


class Shortcut(torch.autograd.Function):
    """The mistake: each iteration's backward uses the final matrix in place of its own."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        m = plain(z, 20, 0.0, "columns-first")
        ctx.save_for_backward(m)
        return m

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        for _ in range(20):
            for side in (-1, -2):
                grad = grad - (grad * m).sum(side, keepdim=True)
        return m * grad


@pytest.mark.parametrize("scale", [3, 6])
def test_a_backward_that_reuses_the_final_matrix_would_be_seen(scale: float) -> None:
    z = logits(scale).requires_grad_()
    upstream = torch.randn(
        50, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    (wrong,) = torch.autograd.grad(Shortcut.apply(z), z, upstream)
    assert error(wrong, both(scale, "columns-first", 0.0)[1][1]) > 0.005
    z = logits(scale, tokens=3).requires_grad_()
    assert not torch.autograd.gradcheck(Shortcut.apply, (z,), atol=1e-4, raise_exception=False)


def test_columns_first_leaves_rows_exact_and_the_other_way_round() -> None:
    z = logits(4, tokens=2000)
    for order, (first, last) in SIDES.items():
        m = sinkhorn(z, 20, 0.0, order)
        assert (m.sum(last) - 1).abs().max() < 1e-12
        assert (m.sum(first) - 1).abs().max() > 1e-3, "the other side carries the truncation"
    turned = sinkhorn(z.mT, 20, 0.0, "rows-first").mT
    assert error(turned, sinkhorn(z, 20, 0.0, "columns-first")) < TOLERANCE


@pytest.mark.parametrize(("scale", "about"), [(1, 0.003), (2, 0.03), (4, 0.06), (6, 0.13)])
def test_twenty_iterations_leave_the_column_error_that_the_mathematics_leaves(
    scale: float, about: float
) -> None:
    m = sinkhorn(logits(scale, tokens=20_000), 20)
    worst = (m.sum(-2) - 1).abs().max().item()
    assert about / 4 < worst < 4 * about
    exact = sinkhorn(logits(scale, tokens=500), 2000)
    assert (exact.sum(-2) - 1).abs().max() < worst / 10, "more iterations leave less"


@pytest.mark.parametrize("order", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enormous_logits_overflow_neither_forward_nor_backward(
    order: str, dtype: torch.dtype
) -> None:
    z = (1e4 * logits(1, tokens=500).sign()).to(dtype).requires_grad_()
    mixed = (1e4 * logits(1, tokens=500)).to(dtype).requires_grad_()
    for x in (z, mixed):
        m = sinkhorn(x, 20, 1e-6, order)
        m.backward(torch.randn_like(m))
        assert m.dtype == torch.float32
        assert m.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert ((m.sum(SIDES[order][1]) - 1).abs() < 1e-3).all()
    assert not torch.exp(z.float()).isfinite().all(), "without the softmax they would overflow"


def test_a_nan_stays_in_its_own_token_and_is_not_hidden() -> None:
    z = logits(1, tokens=3)
    z[1, 2, 0] = math.nan
    m = sinkhorn(z)
    assert m[1].isnan().all()
    assert m[[0, 2]].isfinite().all()


def test_a_permutation_of_streams_permutes_the_map() -> None:
    z, p, q = logits(2), torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])
    assert error(sinkhorn(z[:, p][:, :, q]), sinkhorn(z)[:, p][:, :, q]) < TOLERANCE


def test_any_leading_shape_is_accepted() -> None:
    z = logits(1, tokens=12)
    assert torch.equal(sinkhorn(z.view(3, 4, 4, 4)), sinkhorn(z).view(3, 4, 4, 4))
