"""Metrics of one site from the rows that its kernels wrote."""

from geodiag.reference_models.kernels.stats_layout import MAPS_LAYOUT, STREAMS_LAYOUT

# T tokens, P programs, B blocks of channels, W columns, F columns of the streams


def of_maps(rows_PW, tokens):
    """The site's metrics: means over tokens, and extrema."""
    columns = MAPS_LAYOUT.named(rows_PW)
    values = {name: columns[name].sum() / tokens for name in MAPS_LAYOUT.sums}
    values |= {name: columns[name].amax() for name in MAPS_LAYOUT.maxes}
    values["res_logit_min"] = -values.pop("res_logit_min_negated")
    return values


def of_streams(rows_TBF, elements):
    """The streams' metrics; `elements` is N·C, the number of values in one token's streams."""
    columns = STREAMS_LAYOUT.named(rows_TBF)
    total = {name: columns[name].sum(-1) for name in STREAMS_LAYOUT.sums}
    branch = total["branch"].sqrt()
    mixed = total["mixed"].sqrt()
    gain = (total["after"] / total["before"]).sqrt()
    return {
        "stream_amax": columns["amax"].amax(),
        "stream_rms": (total["after"].mean() / elements).sqrt(),
        "branch_share": (branch / (branch + mixed)).mean(),
        "transport_gain_fwd": gain.mean(),
        "transport_gain_fwd_max": gain.max(),
    }
