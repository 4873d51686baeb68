"""The mHC site's kernels against float64: every output, every gradient, every path."""

import pytest
import torch

from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.autograd.mhc_post import mhc_post, mhc_post_linked
from geodiag.reference_models.kernels.autograd.mhc_pre import mhc_pre, mhc_pre_linked

NAMES = ("inner", "pre", "post", "res", "logits", "streams", "dx", "dphi", "dalpha", "dbias", "df")


def reference_site(x, phi, alpha, bias, f, **options):
    mix = reference.mhc_pre(x, phi, alpha, bias, **options)
    # The block: any function of its input makes the two halves depend on each other as in a model.
    return mix, reference.mhc_post(x, f + mix.inner_TC, mix.post_TN, mix.res_TNN)


def apart(x, phi, alpha, bias, f, **options):
    mix = mhc_pre(x, phi, alpha, bias, **options)
    return mix, mhc_post(x, f + mix.inner_TC, mix.post_TN, mix.res_TNN)


def linked(x, phi, alpha, bias, f, **options):
    mix, link, _ = mhc_pre_linked(x, phi, alpha, bias, **options)
    return mix, mhc_post_linked(x, f + mix.inner_TC, mix.post_TN, mix.res_TNN, link)[0]


def inputs(device, dtype, n, c, tokens, scale=1.0):
    k = n * n + 2 * n
    return (
        torch.randn(tokens, n, c, device=device).to(dtype),
        torch.randn(n * c, k, device=device) / (n * c) ** 0.5,
        torch.randn(3, device=device) * scale,
        torch.randn(k, device=device) * scale,
        torch.randn(tokens, c, device=device).to(dtype),
    )


def run(site, leaves, **options):
    leaves = [v.clone().requires_grad_() for v in leaves]
    mix, streams = site(*leaves, **options)
    outputs = (*mix[:5], streams)
    generator = torch.Generator().manual_seed(1)
    ups = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, ups)
    return dict(zip(NAMES, [*(o.detach() for o in outputs), *grads], strict=True))


def double(leaves):
    return [v.double() for v in leaves]


@pytest.mark.parametrize("site", [apart, linked])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "c", "tokens"), [(1, 24, 5), (2, 40, 19), (4, 72, 21), (8, 24, 6)])
def test_every_output_and_gradient_is_the_definition_s(
    device, error, tolerance, site, dtype, n, c, tokens
):
    leaves = inputs(device, dtype, n, c, tokens)
    ours, truth = run(site, leaves), run(reference_site, double(leaves))
    for name in NAMES:
        # A single stream's map is 1: its logits have no gradient, and what remains is rounding.
        limit = tolerance[dtype] * (20 if n == 1 and name in ("dalpha", "dbias", "dphi") else 1)
        assert error(ours[name], truth[name]) < limit, name


@pytest.mark.parametrize("scale", [0.5, 3.0, 6.0])
def test_exact_at_any_logit_scale(device, error, tolerance, scale):
    leaves = inputs(device, torch.float32, 4, 32, 20, scale)
    ours, truth = run(linked, leaves), run(reference_site, double(leaves))
    for name in NAMES:
        assert error(ours[name], truth[name]) < tolerance[torch.float32], name


@pytest.mark.parametrize(
    "options", [{"order": "rows-first"}, {"iterations": 3, "eps": 1e-4}, {"norm_eps": 0.1}]
)
def test_options_mean_what_they_mean_in_the_reference(device, error, tolerance, options):
    leaves = inputs(device, torch.float32, 4, 32, 9)
    ours, truth = run(linked, leaves, **options), run(reference_site, double(leaves), **options)
    for name in NAMES:
        assert error(ours[name], truth[name]) < tolerance[torch.float32], name


@pytest.mark.parametrize(
    "twin", ["transposed res", "zero gradients", "no norm gradient", "stale coefficients"]
)
def test_wrong_results_exceed_the_tolerance(device, error, tolerance, twin):
    leaves = inputs(device, torch.bfloat16, 4, 72, 21)
    truth = run(reference_site, double(leaves))
    least = 3 * tolerance[torch.bfloat16]
    x, _, _, _, f = leaves
    if twin == "transposed res":
        mix, _ = apart(*leaves)
        wrong = mhc_post(x, f + mix.inner_TC, mix.post_TN, mix.res_TNN.mT)
        assert error(wrong, truth["streams"]) > least
    elif twin == "zero gradients":
        for name in NAMES[6:]:
            assert error(torch.zeros_like(truth[name]), truth[name]) > least
    elif twin == "no norm gradient":
        # As if the RMS were a constant: the part of dx along x is left out.
        x64 = double(leaves)[0]
        along = (
            (truth["dx"] * x64).sum((1, 2), keepdim=True)
            / x64.square().sum((1, 2), keepdim=True)
            * x64
        )
        assert error(truth["dx"] - along, truth["dx"]) > least
    else:
        assert error(truth["res"].roll(1, 0), truth["res"]) > least


def test_linked_and_apart_agree_and_differ_only_in_rounding(device, error):
    leaves = inputs(device, torch.float32, 4, 24, 9)
    a, b = run(linked, leaves), run(apart, leaves)
    for name in NAMES:
        assert error(a[name], b[name]) < 1e-6, name


def test_a_map_changed_between_the_halves_has_its_own_gradient(device, error, tolerance):
    """As a planted fault does: the halves stay linked, and the stream's gradient is mixed by the
    map that was used.
    """

    def changed(before, after):
        def site(x, phi, alpha, bias, f):
            mix, *link = before(x, phi, alpha, bias)
            return mix, after(x, f + mix.inner_TC, mix.post_TN, 1.5 * mix.res_TNN, *link)

        return site

    ours_site = changed(lambda *v: mhc_pre_linked(*v)[:2], lambda *v: mhc_post_linked(*v)[0])
    truth_site = changed(lambda *v: (reference.mhc_pre(*v),), reference.mhc_post)
    leaves = inputs(device, torch.float32, 4, 32, 9)
    ours, truth = run(ours_site, leaves), run(truth_site, double(leaves))
    for name in NAMES:
        assert error(ours[name], truth[name]) < tolerance[torch.float32], name


def test_the_same_bits_every_time(device):
    """On a GPU many times and beside other work: only so does a tile show that is read while it is
    being replaced.
    """
    on_gpu = device == "cuda"
    beside, busy = (
        (torch.cuda.Stream(), torch.randn(4096, 4096, device=device)) if on_gpu else (None, None)
    )
    for _ in range(12 if on_gpu else 1):
        leaves = inputs(device, torch.bfloat16, 4, *((1000, 2000) if on_gpu else (32, 9)))
        first = run(linked, leaves)
        for _ in range(6 if on_gpu else 1):
            with torch.cuda.stream(beside):
                for _ in range(4 if on_gpu else 0):
                    busy @ busy
                    busy.roll(1)
            again = run(linked, leaves)
            for name in NAMES:
                assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_ruins_its_own_token_and_no_other(device, bad):
    leaves = inputs(device, torch.float32, 4, 32, 19)
    leaves[0][7, 2, 5] = bad
    ours = run(linked, leaves)
    others = torch.arange(19, device=device) != 7
    for name in ("inner", "pre", "post", "res", "streams", "dx"):
        assert ours[name][7].isnan().any(), name
        assert ours[name][others].isfinite().all(), name
    assert ours["dphi"].isnan().any()


def test_an_unused_output_costs_no_gradient(device, error, tolerance):
    leaves = [v.requires_grad_() for v in inputs(device, torch.float32, 4, 32, 9)[:4]]
    truth = [v.detach().double().requires_grad_() for v in leaves]
    for field in range(5):
        out, want = mhc_pre(*leaves)[field], reference.mhc_pre(*truth)[field]
        up = torch.randn_like(out)
        ours = torch.autograd.grad(out, leaves, up, allow_unused=True)
        theirs = torch.autograd.grad(want, truth, up.double(), allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            assert error(a, b) < tolerance[torch.float32]


def test_leading_shape_is_kept_and_zero_tokens_are_accepted(device):
    x, phi, alpha, bias, f = inputs(device, torch.float32, 4, 16, 6)
    mix = mhc_pre(x.view(2, 3, 4, 16), phi, alpha, bias)
    assert [tuple(m.shape) for m in mix[:5]] == [
        (2, 3, 16),
        (2, 3, 4),
        (2, 3, 4),
        (2, 3, 4, 4),
        (2, 3, 4, 4),
    ]
    assert mhc_post(x.view(2, 3, 4, 16), f.view(2, 3, 16), mix.post_TN, mix.res_TNN).shape == (
        2,
        3,
        4,
        16,
    )
    none = run(linked, (x[:0], phi, alpha, bias, f[:0]))
    assert none["streams"].shape == (0, 4, 16)
    assert none["dphi"].abs().max() == 0


def test_unsupported_input_is_an_error_that_names_it(device):
    x, phi, alpha, bias, _ = inputs(device, torch.float32, 4, 16, 3)
    with pytest.raises(ValueError, match="streams, not 3"):
        mhc_pre(x[:, :3], phi, alpha, bias)
    with pytest.raises(ValueError, match="phi has shape"):
        mhc_pre(x, phi.T, alpha, bias)
    with pytest.raises(TypeError, match="float64"):
        mhc_pre(x.double(), phi, alpha, bias)
    with pytest.raises(ValueError, match="res has shape"):
        mhc_post(x, x[:, 0], x[..., 0], x[..., 0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnTheGPU:
    def test_a_new_number_of_tokens_compiles_nothing(self):
        from geodiag.reference_models.kernels.device import mhc_pre_forward as module

        for tokens in (64, 65, 1, 1000):
            run(linked, inputs("cuda", torch.bfloat16, 4, 256, tokens))
            # The first run fills the cache; the later ones must find it full.
            caches = [
                len(next(iter(k.device_caches.values()))[0])
                for k in (module.project_streams, module.mix)
            ]
            if tokens == 64:
                first = caches
            assert caches == first

    def test_a_stream_of_more_than_two_billion_numbers(self, error):
        x, phi, alpha, bias, f = inputs("cuda", torch.bfloat16, 4, 2560, 1)
        x = x.expand(210_000, -1, -1).contiguous()
        x[-1] = torch.randn_like(x[-1])
        with torch.no_grad():
            mix = mhc_pre(x, phi, alpha, bias)
            last = reference.mhc_pre(x[-1:].double(), phi.double(), alpha.double(), bias.double())
            out = mhc_post(x, f.expand(210_000, -1).contiguous(), mix.post_TN, mix.res_TNN)
            want = reference.mhc_post(x[-1:].double(), f.double(), last.post_TN, last.res_TNN)
        assert error(mix.inner_TC[-1:], last.inner_TC) < 1e-2
        assert error(out[-1:], want) < 1e-2

    @pytest.mark.parametrize("tokens", [1, 31, 777])
    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_tiles_by_the_copy_engine(self, error, tolerance, n, tokens):
        leaves = inputs("cuda", torch.bfloat16, n, 128, tokens)
        ours, truth = run(linked, leaves), run(reference_site, double(leaves))
        for name in NAMES:
            limit = tolerance[torch.bfloat16] * (
                20 if n == 1 and name in ("dalpha", "dbias", "dphi") else 1
            )
            assert error(ours[name], truth[name]) < limit, name

    def test_the_real_width(self, error, tolerance):
        leaves = inputs("cuda", torch.bfloat16, 4, 2560, 777)
        ours, truth = run(linked, leaves), run(reference_site, double(leaves))
        for name in NAMES:
            assert error(ours[name], truth[name]) < tolerance[torch.bfloat16], name
