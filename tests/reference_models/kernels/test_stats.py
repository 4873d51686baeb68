"""Statistics of maps and streams by the mHC kernels, against the definitions in docs/metrics.md."""

import pytest
import torch

from geodiag.hooks.adapters.base import StatsRows
from geodiag.hooks.measure import experts, gains
from geodiag.hooks.measure.gains import GAINS, SiteMaps
from geodiag.reference_models.kernels.autograd.mhc_post import mhc_post_linked
from geodiag.reference_models.kernels.autograd.mhc_pre import mhc_pre_linked
from geodiag.reference_models.kernels.stats_layout import (
    COUNTS_LAYOUT,
    MAPS_LAYOUT,
    STREAMS_LAYOUT,
)
from tests.reference_models.kernels.summaries import of_maps, of_streams

TOKENS, CHANNELS = 21, 40


def site(device, n=4, iterations=3, scale=2.0, on=1, x=None):
    k = n * n + 2 * n
    x = torch.randn(TOKENS, n, CHANNELS, device=device) if x is None else x
    phi = torch.randn(n * CHANNELS, k, device=device) / (n * CHANNELS) ** 0.5
    alpha, bias = scale * torch.ones(3, device=device), torch.randn(k, device=device)
    flag = torch.tensor(on, dtype=torch.int32, device=device)
    before = mhc_pre_linked(x, phi, alpha, bias, iterations, flag=flag)
    branch = torch.randn(TOKENS, CHANNELS, device=device)
    out, rows = mhc_post_linked(
        x, branch, before.mix.post_TN, before.mix.res_TNN, before.link, flag
    )
    return x, branch, before, out, rows


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_maps_metrics_are_their_definitions(device, n):
    _, _, before, _, _ = site(device, n)
    got = of_maps(before.stats_PW, TOKENS)
    res, post, logits = (
        v.double() for v in (before.mix.res_TNN, before.mix.post_TN, before.mix.logits_TNN)
    )
    rows, columns = res.sum(-1), res.sum(-2)
    sigma = torch.linalg.matrix_norm(res, 2)
    want = {
        "amax_gain_fwd": rows.abs().amax(-1).mean(),
        "amax_gain_bwd": columns.abs().amax(-1).mean(),
        "gain_fwd_min": rows.abs().amin(-1).mean(),
        "gain_bwd_min": columns.abs().amin(-1).mean(),
        "amax_gain_fwd_max": rows.abs().max(),
        "amax_gain_bwd_max": columns.abs().max(),
        "spectral_norm_res": sigma.mean(),
        "spectral_norm_res_max": sigma.max(),
        "sinkhorn_residual": torch.maximum((rows - 1).abs().max(), (columns - 1).abs().max()),
        "res_logit_min": logits.min(),
        "res_logit_max": logits.max(),
        "post_concentration": (post.amax(-1) / post.mean(-1)).mean(),
    }
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-5), name
    rows_PW = MAPS_LAYOUT.named(before.stats_PW)
    worst = torch.maximum(rows_PW["amax_gain_fwd_max"], rows_PW["amax_gain_bwd_max"]).argmax()
    assert int(rows_PW["worst_token"][worst]) == int(
        torch.maximum(rows.abs().amax(-1), columns.abs().amax(-1)).argmax()
    )
    # Three iterations leave the columns visibly off: a transposed reading would not pass.
    assert abs(float(want["amax_gain_bwd_max"] - want["amax_gain_fwd_max"])) > 1e-2


def test_the_streams_metrics_are_their_definitions(device):
    x, branch, before, out, rows = site(device)
    got = of_streams(rows, 4 * CHANNELS)
    wrote = (before.mix.post_TN.unsqueeze(-1) * branch.unsqueeze(-2)).flatten(1).norm(dim=1)
    kept = (before.mix.res_TNN @ x).flatten(1).norm(dim=1)
    gain = out.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    want = {
        "stream_amax": out.abs().max(),
        "stream_rms": out.square().mean().sqrt(),
        "branch_share": (wrote / (wrote + kept)).mean(),
        "transport_gain_fwd": gain.mean(),
        "transport_gain_fwd_max": gain.max(),
    }
    for name, value in want.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-5), name


def test_switched_off_writes_nan_and_changes_no_result(device):
    torch.manual_seed(3)
    _, _, on, out_on, _ = site(device)
    torch.manual_seed(3)
    _, _, off, out_off, rows = site(device, on=0)
    assert off.stats_PW.isnan().all()
    assert rows.isnan().all()
    assert torch.equal(out_on, out_off)
    assert torch.equal(on.mix.res_TNN, off.mix.res_TNN)


def test_a_nan_in_the_stream_is_seen_in_the_extrema(device):
    x = torch.randn(TOKENS, 4, CHANNELS, device=device)
    x[11, 1, 3] = float("nan")
    _, _, before, _, rows = site(device, x=x)
    maps = of_maps(before.stats_PW, TOKENS)
    assert maps["amax_gain_fwd_max"].isnan()
    assert maps["sinkhorn_residual"].isnan()
    assert of_streams(rows, 4 * CHANNELS)["stream_amax"].isnan()


def test_kernels_measure_what_the_monitor_reads_by_name():
    assert set(GAINS.mean_columns) == set(MAPS_LAYOUT.sums)
    assert set(GAINS.extreme_columns) == set(MAPS_LAYOUT.maxes)
    assert set(experts.SUMS) == set(COUNTS_LAYOUT.sums)
    assert set(experts.EXTREMES) == set(COUNTS_LAYOUT.maxes)


def test_a_row_of_the_maps_is_as_wide_as_the_kernel_writes_it(device):
    _, _, before, _, rows = site(device)
    assert before.stats_PW.shape[-1] >= len(MAPS_LAYOUT.names)
    assert rows.shape[-1] == len(STREAMS_LAYOUT.names)


def test_the_monitor_finds_columns_by_name_in_any_order(device):
    _, _, before, _, _ = site(device)
    mix, names = before.mix, MAPS_LAYOUT.names
    shuffled = torch.randperm(len(names)).tolist()
    rows_P = before.stats_PW[:, shuffled]

    def sums(stats):
        seen = SiteMaps(mix.pre_TN, mix.post_TN, mix.res_TNN, mix.logits_TNN, stats)
        return gains.reduce(seen, None)["map_sums"]

    with_sites = [StatsRows(rows[None], names) for rows in (before.stats_PW, rows_P)]
    renamed = StatsRows(rows_P[None], tuple(names[i] for i in shuffled))
    mix = mix._replace(**{n: v[None] for n, v in mix._asdict().items() if n[-2:] in ("TN", "NN")})
    assert torch.equal(sums(renamed), sums(with_sites[0]))
    assert not torch.equal(sums(with_sites[1]), sums(with_sites[0])), "order would be seen"
    without_one = StatsRows(before.stats_PW[None, :, 1 : len(names)], names[1:])
    torch.testing.assert_close(sums(without_one), sums(with_sites[0]), rtol=1e-5, atol=1e-6)
