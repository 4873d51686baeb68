"""Muon over stacks of matrices against torch's Muon on each of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from geodiag.reference_models.muon import StackedMuon, orthogonalize
from tests.reference_models.close import error

TOLERANCE = 1e-4
SHAPES = [(3, 8, 24), (3, 24, 8), (2, 16, 16)]


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Badly conditioned, like real ones: one direction a hundred times the others.
    return [
        torch.randn(shape, generator=generator) * torch.linspace(0.1, 10, shape[-1])
        for _ in range(steps)
    ]


def ours(start: Tensor, grads: list[Tensor], **changes: float) -> Tensor:
    p = nn.Parameter(start.clone())
    optimizer = StackedMuon([p], **({"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1} | changes))
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach() - start


def torchs(start: Tensor, grads: list[Tensor]) -> Tensor:
    each = [nn.Parameter(m.clone()) for m in start]
    optimizer = torch.optim.Muon(
        each, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for grad in grads:
        for p, g in zip(each, grad, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return torch.stack([p.detach() for p in each]) - start


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon orthogonalises in bfloat16; the same in float32, so that the mathematics can be
    compared.
    """
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_moves_as_torchs_muon_moves_each_matrix(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(shape), gradients(shape, 6)
    assert error(ours(start, grads), torchs(start, grads)) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_all_that_torchs_own_differs_by(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(shape), gradients(shape, 6)
    assert error(ours(start, grads), torchs(start, grads)) < 0.05


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("changes", [{"momentum": 0.9}, {"weight_decay": 0.0}, {"lr": 0.0201}])
def test_another_momentum_decay_or_rate_would_be_seen(changes: dict[str, float]) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(SHAPES[0]), gradients(SHAPES[0], 6)
    assert error(ours(start, grads, **changes), torchs(start, grads)) > 10 * TOLERANCE


@pytest.mark.usefixtures("in_float32")
def test_orthogonalising_the_stack_as_one_matrix_would_be_seen() -> None:
    grad = gradients(SHAPES[0], 1)[0]
    each = torch.stack([orthogonalize(g[None])[0] for g in grad])
    assert error(orthogonalize(grad), each) < TOLERANCE
    assert error(orthogonalize(grad.flatten(0, 1)[None])[0].view_as(grad), each) > 0.1


def test_singular_values_come_near_one_whatever_they_were() -> None:
    for shape in SHAPES:
        grad = gradients(shape, 1)[0]
        before, after = torch.linalg.svdvals(grad), torch.linalg.svdvals(orthogonalize(grad))
        assert (before.amax(-1) > 3 * before.amin(-1)).all()
        assert after.min() > 0.3
        assert after.max() < 1.4


@pytest.mark.parametrize(
    "grad", [torch.zeros(2, 4, 6), torch.full((2, 4, 6), 1e-30), torch.full((2, 4, 6), 1e30)]
)
def test_no_gradient_a_tiny_one_and_a_huge_one_give_finite_updates(grad: Tensor) -> None:
    start = torch.randn(2, 4, 6)
    moved = ours(start, [grad], weight_decay=0.0)
    assert moved.isfinite().all()
    if not grad.any():
        assert not moved.any()


def test_an_expert_without_gradient_stays_while_the_others_move() -> None:
    start, grad = torch.randn(3, 8, 8), torch.randn(3, 8, 8)
    grad[1] = 0
    moved = ours(start, [grad], weight_decay=0.0)
    assert not moved[1].any()
    assert moved[0].any()


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    p = nn.Parameter(torch.randn(2, 4, 4))
    optimizer = StackedMuon([p])

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    step: Callable[..., float | None] = optimizer.step
    assert step(closure) == pytest.approx(p.square().sum().item(), rel=0.1)
    assert p.grad is not None
