"""Metrics of the residual maps H_res: gains of each map, of their products over depth, norms.

Stage 3 of the tear cascade, amplification. One value a residual site (`attn`, `ffn`).
"""

from functools import partial

from geodiag.metrics.metric import Chart, metric
from geodiag.metrics.sources import MHC, MHC_FIGURE_8

_gain = partial(metric, "layers", group="gains", place="site")
_map = partial(_gain, part="map", source=MHC)
_of_mean = partial(_gain, source=MHC_FIGURE_8)
_map_of_mean = partial(_of_mean, part="map")
_gain_page = partial(Chart, page="gain")

_single = partial(_gain_page, quantity="single", menu="single-site gain")
_composite = partial(_gain_page, quantity="composite", menu="composite gain")
_spectral = partial(_gain_page, quantity="spectral", menu="spectral norm")


# Gains of one map H_res: largest and smallest |row sum| (forward) and |column sum| (backward).
_SINGLE = [
    _map(
        "amax_gain_fwd",
        "×",
        "mean",
        "Largest |row sum| of H_res, mean over tokens.",
        stage=3,
        chart=_single(over="mean"),
    ),
    _map(
        "amax_gain_bwd",
        "×",
        "mean",
        "Largest |column sum| of H_res, mean over tokens.",
        stage=3,
        chart=_single(over="mean"),
    ),
    _map(
        "amax_gain_fwd_max",
        "×",
        "max",
        "Largest |row sum| of H_res, worst token.",
        stage=3,
        headline="Stage 3",
        chart=_single(over="max"),
    ),
    _map(
        "amax_gain_bwd_max",
        "×",
        "max",
        "Largest |column sum| of H_res, worst token.",
        stage=3,
        headline="Stage 3",
        chart=_single(over="max"),
    ),
    _map(
        "gain_fwd_min",
        "×",
        "mean",
        "Smallest |row sum| of H_res, mean over tokens: attenuation.",
        worse="low",
        chart=_single(over="min"),
    ),
    _map(
        "gain_bwd_min",
        "×",
        "mean",
        "Smallest |column sum| of H_res, mean over tokens: attenuation.",
        worse="low",
        chart=_single(over="min"),
    ),
]

# Gains of composites: the product of all maps up to a site, or from a site to the end.
_COMPOSITE = [
    _gain(
        "composite_gain_fwd",
        "×",
        "mean",
        "Amax gain of all maps up to here, mean over tokens.",
        stage=3,
        part="stream",
        headline="Stage 3",
        live=True,
        chart=_composite(over="mean"),
        source=MHC,
    ),
    _gain(
        "composite_gain_fwd_min",
        "×",
        "mean",
        "Smallest |row sum| of the composite, mean over tokens.",
        worse="low",
        chart=_composite(over="min"),
        source=MHC,
    ),
    _gain(
        "composite_gain_fwd_max",
        "×",
        "max",
        "Amax gain of all maps up to here, worst token.",
        stage=3,
        part="stream",
        chart=_composite(over="max"),
        source=MHC,
    ),
    _gain(
        "composite_gain_bwd",
        "×",
        "mean",
        "Amax gain of all maps from here to the end, mean over tokens.",
        stage=3,
        headline="Stage 3",
        live=True,
        chart=_composite(over="mean"),
        source=MHC,
    ),
    _gain(
        "composite_gain_bwd_min",
        "×",
        "mean",
        "Smallest |column sum| of the composite, mean over tokens.",
        worse="low",
        chart=_composite(over="min"),
        source=MHC,
    ),
    _gain(
        "composite_gain_bwd_max",
        "×",
        "max",
        "Amax gain of all maps from here to the end, worst token.",
        stage=3,
        chart=_composite(over="max"),
        source=MHC,
    ),
]

# A second definition (Fig. 8 of the mHC paper): the gains of the map that is averaged over tokens.
_OF_MEAN = [
    _map_of_mean(
        "amax_gain_fwd_of_mean",
        "×",
        "mean",
        "Amax gain of the token-mean map (a second definition).",
        chart=_single(over="of_mean"),
    ),
    _map_of_mean(
        "amax_gain_bwd_of_mean",
        "×",
        "mean",
        "Backward Amax gain of the token-mean map.",
        chart=_single(over="of_mean"),
    ),
    _of_mean(
        "gain_fwd_min_of_mean",
        "×",
        "mean",
        "Smallest |row sum| of the token-mean map.",
        worse="low",
    ),
    _of_mean(
        "gain_bwd_min_of_mean",
        "×",
        "mean",
        "Smallest |column sum| of the token-mean map.",
        worse="low",
    ),
    _of_mean(
        "composite_gain_fwd_of_mean",
        "×",
        "mean",
        "Amax gain of the product of token-mean maps.",
        chart=_composite(over="of_mean"),
    ),
    _of_mean(
        "composite_gain_bwd_of_mean",
        "×",
        "mean",
        "Backward Amax gain of the product of token-mean maps.",
        chart=_composite(over="of_mean"),
    ),
    _of_mean(
        "composite_gain_fwd_min_of_mean",
        "×",
        "mean",
        "Smallest |row sum| of the product of token-mean maps.",
        worse="low",
    ),
    _of_mean(
        "composite_gain_bwd_min_of_mean",
        "×",
        "mean",
        "Smallest |column sum| of the product of token-mean maps.",
        worse="low",
    ),
]

_MAPS = [
    _gain(
        "early_signal_share",
        "1",
        "mean",
        "Product of the smallest gains of the mean maps from the first site to here.",
        worse="low",
        chart=_gain_page(quantity="early", menu="early signal share", over="mean"),
    ),
    _map(
        "spectral_norm_res",
        "×",
        "mean",
        "‖H_res‖₂, mean over tokens.",
        stage=3,
        chart=_spectral(over="mean"),
    ),
    _map(
        "spectral_norm_res_max",
        "×",
        "max",
        "‖H_res‖₂, worst token.",
        stage=3,
        chart=_spectral(over="max"),
    ),
    _gain(
        "spectral_norm_product",
        "×",
        "mean",
        "Product of ‖H_res‖₂ from here to the end, mean over tokens: "
        "what the maps alone may make of a small change.",
        stage=3,
    ),
    _map(
        "sinkhorn_residual",
        "1",
        "max",
        "Largest |row or column sum − 1|: what Sinkhorn left.",
        scale="plain",  # a residual that grows from 1e-6 to 1e-5 is still none
        headline="Stage 3",
        chart=_gain_page(quantity="sinkhorn", menu="Sinkhorn residual", over="max"),
    ),
    _gain(
        "res_logit_min",
        "logit",
        "min",
        "Smallest entry of H_res before its projection.",
        worse="low",
        source=MHC,
    ),
    _gain(
        "res_logit_max",
        "logit",
        "max",
        "Largest entry of H_res before its projection: saturation.",
        source=MHC,
    ),
    _gain(
        "post_concentration",
        "×",
        "mean",
        "Largest over mean H_post: N = all mass on one stream.",
        worse=None,
        chart=_gain_page(quantity="post", menu="post concentration", over="mean"),
    ),
]

GAIN_METRICS = [*_SINGLE, *_COMPOSITE, *_OF_MEAN, *_MAPS]
