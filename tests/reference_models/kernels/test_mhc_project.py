"""The fused kernel between two sites: the streams after one, and their projection for the next."""

import pytest
import torch

from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.autograd.mhc_post import mhc_post_linked
from geodiag.reference_models.kernels.autograd.mhc_post_project import fuses, mhc_post_project
from geodiag.reference_models.kernels.autograd.mhc_pre import mhc_pre_linked
from tests.reference_models.kernels.summaries import of_streams

NAMES = ("inner", "streams", "dx", "dphi", "dalpha", "dbias", "df", "dphi of the next")


def inputs(device, dtype, n, c, tokens):
    k = n * n + 2 * n

    def phi():
        return torch.randn(n * c, k, device=device) / (n * c) ** 0.5

    return (
        torch.randn(tokens, n, c, device=device).to(dtype),
        phi(),
        torch.randn(3, device=device),
        torch.randn(k, device=device),
        torch.randn(tokens, c, device=device).to(dtype),
        phi(),
    )


def fused(x, phi, alpha, bias, f, next_phi, flag=None):
    """Two sites, each around a block; the second one's maps are made of the fused projection."""
    first, link, _ = mhc_pre_linked(x, phi, alpha, bias)
    x, _, sums = mhc_post_project(
        x, f + first.inner_TC, first.post_TN, first.res_TNN, link, next_phi, flag
    )
    second, link, _ = mhc_pre_linked(x, next_phi, alpha, bias, projected=sums)
    return second.inner_TC, mhc_post_linked(
        x, second.inner_TC, second.post_TN, second.res_TNN, link
    )[0]


def truth(x, phi, alpha, bias, f, next_phi):
    first = reference.mhc_pre(x, phi, alpha, bias)
    x = reference.mhc_post(x, f + first.inner_TC, first.post_TN, first.res_TNN)
    second = reference.mhc_pre(x, next_phi, alpha, bias)
    return second.inner_TC, reference.mhc_post(x, second.inner_TC, second.post_TN, second.res_TNN)


def run(sites, leaves):
    leaves = [v.clone().requires_grad_() for v in leaves]
    out = sites(*leaves)
    generator = torch.Generator().manual_seed(1)
    ups = [torch.randn(o.shape, generator=generator).to(o) for o in out]
    return dict(
        zip(
            NAMES, [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, ups)], strict=True
        )
    )


def shape(device):
    return (
        ("cuda", torch.bfloat16, 4, 256, 777)
        if device == "cuda"
        else ("cpu", torch.float32, 4, 72, 21)
    )


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_two_sites_are_the_definition_s(device, error, tolerance, n):
    where, dtype, _, c, tokens = shape(device)
    if where == "cuda" and n != 4:
        pytest.skip("on a GPU it serves four streams")
    leaves = inputs(where, dtype, n, c, tokens)
    ours, want = run(fused, leaves), run(truth, [v.double() for v in leaves])
    for name in NAMES:
        # Two sites, two roundings of the stream between them.
        assert error(ours[name], want[name]) < 2 * tolerance[leaves[0].dtype], name


@pytest.mark.parametrize("twin", ["another site's φ", "the streams before"])
def test_a_projection_of_something_else_is_seen(device, error, tolerance, twin):
    x, phi, alpha, bias, f, next_phi = inputs(*shape(device))
    want, _ = truth(*(v.double() for v in (x, phi, alpha, bias, f, next_phi)))
    first = mhc_pre_linked(x, phi, alpha, bias).mix
    arguments = (x, f + first.inner_TC, first.post_TN, first.res_TNN, None)
    new, _, sums = mhc_post_project(*arguments, phi if twin == "another site's φ" else next_phi)
    stream = x if twin == "the streams before" else new
    wrong = mhc_pre_linked(stream, next_phi, alpha, bias, projected=sums).mix.inner_TC
    assert error(wrong, want) > 5 * tolerance[x.dtype]


def test_the_fused_kernel_measures_what_the_single_one_does(device):
    x, phi, alpha, bias, f, next_phi = inputs(*shape(device))
    mix = mhc_pre_linked(x, phi, alpha, bias).mix
    on = torch.ones((), dtype=torch.int32, device=device)
    arguments = (x, f, mix.post_TN, mix.res_TNN, None)
    _, ours, _ = mhc_post_project(*arguments, next_phi, on)
    _, theirs = mhc_post_linked(*arguments, on)
    elements = x.shape[1] * x.shape[2]
    a, b = (
        of_streams(ours, elements),
        of_streams(theirs, elements),
    )
    assert a["stream_amax"] == b["stream_amax"]
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=0)
    _, off, _ = mhc_post_project(*arguments, next_phi, torch.zeros_like(on))
    assert off.isnan().all()


def test_fuses_accepts_exactly_the_streams_that_the_kernel_takes(device):
    assert fuses(torch.empty(1, 4, 2560, dtype=torch.bfloat16, device=device))
    if device == "cuda":
        for odd in (
            torch.empty(1, 2, 2560),
            torch.empty(1, 4, 2560),
            torch.empty(1, 4, 2500).bfloat16(),
        ):
            assert not fuses(odd.cuda())


def test_compiles_whole_and_gives_the_eager_numbers(device, error, tolerance):
    leaves = inputs(*shape(device))
    compiled = torch.compile(
        fused, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    ours, eager = run(compiled, leaves), run(fused, leaves)
    for name in NAMES:
        assert error(ours[name], eager[name]) < tolerance[leaves[0].dtype], name


def test_zero_tokens_are_accepted(device):
    x, phi, alpha, bias, f, next_phi = inputs(*shape(device))
    none = run(fused, (x[:0], phi, alpha, bias, f[:0], next_phi))
    assert none["streams"].shape[0] == 0
