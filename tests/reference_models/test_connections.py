"""Hyper-connections as they start, and what they do to the streams."""

import pytest
import torch

from geodiag.reference_models.config import ModelConfig, sized
from geodiag.reference_models.mhc import HyperConnection, Write
from geodiag.reference_models.transformer import Transformer
from tests.reference_models.close import error

N = 4


def started(residual: str, site: int, **changes) -> HyperConnection:
    torch.manual_seed(0)
    made = HyperConnection(sized("tiny", residual, **changes), site)
    made.reset()
    return made


def streams() -> torch.Tensor:
    return torch.randn(2, 5, N, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("site", range(6))
def test_hc_starts_with_the_values_of_its_paper(site: int) -> None:
    mix = started("hc", site)(streams())
    read = torch.eye(N)[site % N]
    for found, wanted in (
        (mix.pre_TN, read),
        (mix.post_TN, torch.ones(N)),
        (mix.res_TNN, torch.eye(N)),
    ):
        assert (found - wanted).abs().max() <= 0.01, "alpha times a tanh is all that may differ"
    exact = started("hc", site, alpha_init=0.0)(streams())
    assert torch.equal(exact.pre_TN, read.expand(2, 5, N))
    assert torch.equal(exact.post_TN, torch.ones(2, 5, N))
    assert torch.equal(exact.res_TNN, torch.eye(N).expand(2, 5, N, N))


@pytest.mark.parametrize("site", range(6))
def test_mhc_starts_doubly_stochastic_and_near_the_plain_residual(site: int) -> None:
    mix = started("mhc", site)(streams())
    assert mix.res_TNN is not None
    assert mix.pre_TN is not None
    assert (mix.res_TNN >= 0).all()
    assert (mix.res_TNN.sum(-1) - 1).abs().max() < 1e-5
    assert (mix.res_TNN.sum(-2) - 1).abs().max() < 1e-4
    assert (mix.res_TNN.diagonal(dim1=-2, dim2=-1) > 0.8).all(), "streams are kept apart"
    assert (mix.pre_TN.argmax(-1) == site % N).all(), "mostly one stream is read"
    assert (mix.post_TN - 1).abs().max() < 0.01, "all are written"


def test_a_plain_site_adds_its_branch_to_the_one_stream() -> None:
    x, branch = streams()[..., :1, :], torch.randn(2, 5, 64)
    site = Transformer(sized("tiny", "plain")).blocks[0].attn_hc
    assert torch.equal(Write()(x, branch, site(x)).streams_TNC, x + branch.unsqueeze(-2))


@pytest.mark.parametrize("residual", ["hc", "mhc"])
def test_equal_streams_start_out_as_one_plain_stream(residual: str) -> None:
    x, branch = streams()[..., :1, :].expand(-1, -1, N, -1), torch.randn(2, 5, 64)
    mix = started(residual, 0, alpha_init=0.0)(x)
    assert error(Write()(x, branch, mix).streams_TNC, x + branch.unsqueeze(-2)) < 1e-5


def test_a_transposed_map_would_be_seen() -> None:
    """The twin of orientation: rows are outputs."""
    connection = started("hc", 0)
    with torch.no_grad():
        connection.bias[2 * N :] = torch.arange(N * N) / 10
    x, branch = streams(), torch.zeros(2, 5, 64)
    mix = connection(x)
    assert mix.res_TNN is not None
    slow = torch.zeros_like(x)
    for i in range(N):
        for j in range(N):
            slow[..., i, :] += mix.res_TNN[..., i, j, None] * x[..., j, :]
    assert error(Write()(x, branch, mix).streams_TNC, slow) < 1e-5
    assert error(Write()(x, branch, mix._replace(res_TNN=mix.res_TNN.mT)).streams_TNC, slow) > 0.01


def test_the_read_out_starts_as_the_mean_of_the_streams() -> None:
    model = Transformer(sized("tiny", "mhc"))
    x = streams()
    assert error(model.read_out(x), x.mean(-2)) < 0.02
    assert error(model.read_out(x), x[..., 0, :]) > 0.5


def test_all_residual_kinds_start_with_the_loss_of_a_uniform_guess() -> None:
    for residual in ("plain", "hc", "mhc"):
        torch.manual_seed(0)
        config: ModelConfig = sized("tiny", residual)  # type: ignore[arg-type]
        model = Transformer(config)
        ids = torch.randint(config.vocab, (2, 33))
        loss = model.loss(model(ids[:, :-1]), ids[:, 1:])
        assert loss.token.item() == pytest.approx(5.545, abs=0.1), residual
