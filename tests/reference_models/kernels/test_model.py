"""The reference model with Triton kernels is the reference model: same losses, same gradients, same
choices.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from geodiag.reference_models.config import ModelConfig
from geodiag.reference_models.kernels.autograd import mhc_pre
from geodiag.reference_models.transformer import Transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(kernels: str, residual: str, **changes: Any) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab=32,
        layers=2,
        channels=16,
        heads=2,
        head_dim=8,
        sequence=8,
        experts=4,
        expert_dim=8,
        alpha_init=0.5,
        residual=residual,
        streams=4,
        swiglu_limit=0.05,
        kernels=kernels,
    )
    return Transformer(replace(config, **changes)).to(DEVICE)


def run(
    kernels: str, residual: str, scale: float = 1.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = made(kernels, residual)
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for p in model.parameters():
        p.data *= 1 + 0.5 * (scale - 1)
    loss = model.loss(model(ids[:, :-1]), ids[:, 1:]).total
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("residual", ["mhc", "hc"])
def test_both_kernels_give_the_same_loss_and_gradients(residual: str) -> None:
    (loss, grads), (expected, reference) = run("triton", residual), run("reference", residual)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert grads.keys() == reference.keys()
    for name, grad in grads.items():
        error = (grad - reference[name]).norm() / reference[name].norm().clamp_min(1e-12)
        assert error < 1e-3, name


def test_streams_are_projected_by_the_kernel_that_wrote_them_unless_they_were_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    projected = []
    project = mhc_pre.project
    monkeypatch.setattr(
        mhc_pre, "project", lambda x, phi: projected.append(phi.shape[1]) or project(x, phi)
    )
    # What the fused kernel serves on a GPU; the interpreter takes everything, bfloat16 excepted.
    served = {"channels": 128, "dtype": "bfloat16"} if DEVICE == "cuda" else {}
    model, ids = made("triton", "mhc", **served), torch.zeros(1, 8, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        model(ids)
        assert len(projected) == 2, (
            "the first site and the read-out have no site before them that could"
        )
        handle = model.blocks[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
        changed, _ = model(ids)
        assert len(projected) == 2 + 3, "streams that a hook made anew are projected anew"
        handle.remove()
        model = made("reference", "mhc", **served)
        model.blocks[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
        wanted = model(ids)[0].float()
        assert (changed.float() - wanted).norm() / wanted.norm() < (2e-2 if served else 1e-4)


def test_another_model_would_be_seen() -> None:
    (loss, grads), (expected, reference) = run("triton", "mhc", scale=1.1), run("reference", "mhc")
    assert loss.item() != pytest.approx(expected.item(), rel=1e-5)
    errors = [((g - reference[n]).norm() / reference[n].norm()).item() for n, g in grads.items()]
    assert max(errors) > 1e-2
