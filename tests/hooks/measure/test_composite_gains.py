"""The one kernel of composites and spectral norms against its definition, and against products
written out.
"""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from geodiag.hooks.measure import formulas as metrics
from geodiag.hooks.measure.composite_gains import composites, launch
from tests.hooks import slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("sites", "tokens", "n"), [(5, 9, 4), (1, 3, 2), (3, 70, 8), (2, 1, 4), (4, 5, 1)]
)
def test_the_kernel_gives_what_the_products_give(sites: int, tokens: int, n: int) -> None:
    res = torch.randn(sites, tokens, n, n, generator=torch.Generator().manual_seed(n)).to(DEVICE)
    got = launch(res)
    exact = res.double().cpu().numpy()
    for plane, products, axis in (
        (0, slow.composites_fwd(exact), -1),
        (2, slow.composites_bwd(exact), -2),
    ):
        sums = np.abs(products.sum(axis))
        np.testing.assert_allclose(got[plane].cpu(), sums.max(-1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got[plane + 1].cpu(), sums.min(-1), rtol=1e-4, atol=1e-5)
    sigma = torch.linalg.matrix_norm(res.double(), 2).cpu()
    assert ((got[4].double().cpu() - sigma).abs() / sigma).max() < 1e-5
    if sites > 1 and n > 1:
        turned = launch(res.mT.contiguous())
        assert (turned[0] - got[0]).abs().max() > 1e-2, "a transposed map must be seen"


def test_the_kernel_and_its_definition_agree_where_both_can_run() -> None:
    res = torch.randn(6, 20, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(launch(res.to(DEVICE)).cpu(), composites(res), rtol=1e-4, atol=1e-5)
    three = torch.randn(2, 5, 3, 3)
    assert torch.equal(composites(three)[4], metrics.spectral_norm(three)), (
        "any N has its composites"
    )


def test_a_nan_stays_in_its_own_token_and_goes_through_the_sites() -> None:
    res = torch.rand(4, 3, 4, 4)
    res[1, 2, 0, 0] = torch.nan
    got = launch(res.to(DEVICE)).cpu()
    assert not got[:, :, :2].isnan().any()
    assert got[0, :, 2].isnan().tolist() == [False, True, True, True]
    assert got[2, :, 2].isnan().tolist() == [True, True, False, False]
    assert got[4, :, 2].isnan().tolist() == [False, True, False, False]
