"""The quantities of a layer, in the order of the tear: amplification, curvature, chart
(docs/metrics.md).
"""

from functools import partial

from geodiag.metrics.metric import metric

MHC = "arXiv 2512.24880 §3.1"
V4 = "arXiv 2606.19348 §4.2.3"
V4_CLAMP = "arXiv 2606.19348"
FIG8 = "arXiv 2512.24880 Fig. 8"
NORMS = "arXiv 2602.10604"
BALANCE = "arXiv 2408.15664"

_layer = partial(metric, "layers")

_GAIN = {"stage": 3, "source": MHC}
_SHRINK = {"worse": "low", "source": MHC}
CLAMP = {"stage": 1, "source": V4_CLAMP}
_AMPLIFICATION = [
    _layer("amax_gain_fwd", "×", "mean", "Largest |row sum| of H_res, mean over tokens.", **_GAIN),
    _layer(
        "amax_gain_bwd", "×", "mean", "Largest |column sum| of H_res, mean over tokens.", **_GAIN
    ),
    _layer("amax_gain_fwd_max", "×", "max", "Largest |row sum| of H_res, worst token.", **_GAIN),
    _layer("amax_gain_bwd_max", "×", "max", "Largest |column sum| of H_res, worst token.", **_GAIN),
    _layer(
        "gain_fwd_min",
        "×",
        "mean",
        "Smallest |row sum| of H_res, mean over tokens: attenuation.",
        **_SHRINK,
    ),
    _layer(
        "gain_bwd_min",
        "×",
        "mean",
        "Smallest |column sum| of H_res, mean over tokens: attenuation.",
        **_SHRINK,
    ),
    _layer(
        "composite_gain_fwd",
        "×",
        "mean",
        "Amax gain of all maps up to here, mean over tokens.",
        **_GAIN,
    ),
    _layer(
        "composite_gain_fwd_min",
        "×",
        "mean",
        "Smallest |row sum| of the composite, mean over tokens.",
        **_SHRINK,
    ),
    _layer(
        "composite_gain_fwd_max",
        "×",
        "max",
        "Amax gain of all maps up to here, worst token.",
        **_GAIN,
    ),
    _layer(
        "composite_gain_bwd",
        "×",
        "mean",
        "Amax gain of all maps from here to the end, mean over tokens.",
        **_GAIN,
    ),
    _layer(
        "composite_gain_bwd_min",
        "×",
        "mean",
        "Smallest |column sum| of the composite, mean over tokens.",
        **_SHRINK,
    ),
    _layer(
        "composite_gain_bwd_max",
        "×",
        "max",
        "Amax gain of all maps from here to the end, worst token.",
        **_GAIN,
    ),
    _layer(
        "amax_gain_fwd_of_mean",
        "×",
        "mean",
        "Amax gain of the token-mean map (a second definition).",
        source=FIG8,
    ),
    _layer(
        "amax_gain_bwd_of_mean",
        "×",
        "mean",
        "Backward Amax gain of the token-mean map.",
        source=FIG8,
    ),
    _layer(
        "gain_fwd_min_of_mean",
        "×",
        "mean",
        "Smallest |row sum| of the token-mean map.",
        worse="low",
        source=FIG8,
    ),
    _layer(
        "gain_bwd_min_of_mean",
        "×",
        "mean",
        "Smallest |column sum| of the token-mean map.",
        worse="low",
        source=FIG8,
    ),
    _layer(
        "composite_gain_fwd_of_mean",
        "×",
        "mean",
        "Amax gain of the product of token-mean maps.",
        source=FIG8,
    ),
    _layer(
        "composite_gain_bwd_of_mean",
        "×",
        "mean",
        "Backward Amax gain of the product of token-mean maps.",
        source=FIG8,
    ),
    _layer(
        "composite_gain_fwd_min_of_mean",
        "×",
        "mean",
        "Smallest |row sum| of the product of token-mean maps.",
        worse="low",
        source=FIG8,
    ),
    _layer(
        "composite_gain_bwd_min_of_mean",
        "×",
        "mean",
        "Smallest |column sum| of the product of token-mean maps.",
        worse="low",
        source=FIG8,
    ),
    _layer(
        "early_signal_share",
        "1",
        "mean",
        "Product of the smallest gains of the mean maps from the first site to here.",
        worse="low",
    ),
    _layer("spectral_norm_res", "×", "mean", "‖H_res‖₂, mean over tokens.", **_GAIN),
    _layer("spectral_norm_res_max", "×", "max", "‖H_res‖₂, worst token.", **_GAIN),
    _layer(
        "spectral_norm_product",
        "×",
        "mean",
        "Product of ‖H_res‖₂ from here to the end, mean over tokens: what the maps alone may make of a small change.",
        stage=3,
    ),
    _layer(
        "perturbation_growth",
        "×",
        ("last", "mean"),
        "‖change of the last stream‖ over ‖small random change of the stream entering the layer‖, probe tokens.",
        every=50,
        stage=3,
    ),
    _layer(
        "sinkhorn_residual",
        "1",
        "max",
        "Largest |row or column sum − 1|: what Sinkhorn left.",
        source=MHC,
    ),
    _layer(
        "res_logit_min",
        "logit",
        "min",
        "Smallest entry of H_res before its projection.",
        worse="low",
        source=MHC,
    ),
    _layer(
        "res_logit_max",
        "logit",
        "max",
        "Largest entry of H_res before its projection: saturation.",
        source=MHC,
    ),
    _layer(
        "branch_share", "1", "mean", "How much of the update is the block's own output.", worse=None
    ),
    _layer(
        "post_concentration",
        "×",
        "mean",
        "Largest over mean H_post: N = all mass on one stream.",
        worse=None,
    ),
    _layer(
        "stream_amax",
        "1",
        "max",
        "Largest |x| of the residual stream after the site.",
        healthy=(None, 65504.0),
        stage=3,
    ),
    _layer("stream_rms", "1", "mean", "RMS of the residual stream after the site.", stage=3),
    _layer(
        "transport_gain_fwd",
        "×",
        "mean",
        "Growth of a token's stream across the site, mean.",
        stage=3,
    ),
    _layer(
        "transport_gain_fwd_max",
        "×",
        "max",
        "Growth of a token's stream across the site, worst token.",
    ),
    _layer(
        "transport_gain_bwd",
        "×",
        "mean",
        "Growth of the gradient across the site, towards the input.",
        stage=3,
    ),
    _layer("grad_norm", "1", ("mean", "max"), "Gradient norm of the layer's parameters.", stage=3),
]

_CURVATURE = [
    _layer(
        "clamp_gate_rate", "share", "mean", "Gate pre-activations above the SwiGLU limit.", **CLAMP
    ),
    _layer("clamp_up_high_rate", "share", "mean", "Up pre-activations above the limit.", **CLAMP),
    _layer(
        "clamp_up_low_rate", "share", "mean", "Up pre-activations below minus the limit.", **CLAMP
    ),
    _layer("gate_amax", "1", "max", "Largest |gate| before the clamp.", stage=1),
    _layer("up_amax", "1", "max", "Largest |up| before the clamp.", stage=1),
    _layer("act_amax", "1", "max", "Largest |activation| of the gated product.", stage=1),
    _layer(
        "expert_norm_max_median",
        "×",
        ("last", "max"),
        "Largest expert's activation RMS over the median expert's.",
        stage=1,
        source=NORMS,
    ),
    _layer(
        "expert_norm_min_median",
        "×",
        ("last", "min"),
        "Smallest expert's activation RMS over the median expert's.",
        worse="low",
        source=NORMS,
    ),
    _layer(
        "curvature",
        "1",
        ("last", "mean"),
        "‖f(x+εv) − 2f(x) + f(x−εv)‖ / ‖f(x+εv) − f(x−εv)‖, f the expert block, routing held; mean of probe tokens.",
        every=50,
        stage=1,
    ),
    _layer(
        "curvature_max", "1", ("last", "max"), "The same, worst probe token.", every=50, stage=1
    ),
    _layer(
        "attn_logit_max",
        "logit",
        ("last", "max"),
        "Largest attention logit of sampled queries of the probe batch.",
        every=10,
        stage=1,
    ),
    _layer(
        "spectral_norm_gate",
        "×",
        "last",
        "Top singular value of the gate weights, worst expert.",
        every=10,
        stage=1,
    ),
    _layer(
        "spectral_norm_up",
        "×",
        "last",
        "Top singular value of the up weights, worst expert.",
        every=10,
        stage=1,
    ),
    _layer(
        "spectral_norm_down",
        "×",
        "last",
        "Top singular value of the down weights, worst expert.",
        every=10,
        stage=1,
    ),
]

_CHART = [
    _layer(
        "flip_rate",
        "share",
        ("last", "mean"),
        "Share of chosen experts that changed since the last probe, fixed tokens.",
        every=10,
        stage=2,
    ),
    _layer(
        "flip_top1",
        "share",
        ("last", "mean"),
        "Probe tokens whose first expert changed.",
        every=10,
        stage=2,
    ),
    _layer(
        "flip_any",
        "share",
        ("last", "mean"),
        "Probe tokens with any of their K experts changed.",
        every=10,
        stage=2,
    ),
    _layer(
        "tear",
        "1",
        ("last", "mean"),
        "‖F(x; A) − F(x; A_then)‖ / ‖F(x; A)‖, F the expert block, A_then the last probe's; mean of probe tokens.",
        every=10,
        stage=2,
    ),
    _layer(
        "tear_flipped",
        "1",
        ("last", "mean"),
        "The same, over the tokens whose choice changed.",
        every=10,
        stage=2,
    ),
    _layer(
        "flip_rate_router",
        "share",
        "mean",
        "Flips that the router's own update alone causes.",
        stage=2,
    ),
    _layer(
        "flip_rate_anticipatory",
        "share",
        "mean",
        "Cached against live choice while anticipatory routing is on.",
        worse=None,
        source=V4,
    ),
    _layer(
        "router_margin_p01",
        "score",
        ("last", "mean"),
        "Last chosen over best rejected expert: 1st percentile.",
        worse="low",
    ),
    _layer(
        "router_margin_p10",
        "score",
        ("last", "mean"),
        "Last chosen over best rejected expert: 10th percentile.",
        worse="low",
    ),
    _layer(
        "router_margin_mean",
        "score",
        "mean",
        "Last chosen over best rejected expert: mean.",
        worse="low",
    ),
    _layer(
        "router_entropy",
        "nats",
        "mean",
        "Entropy of the normalised scores, mean over tokens.",
        worse="low",
        stage=2,
    ),
    _layer(
        "max_vio",
        "×",
        "last",
        "Busiest expert over the mean load, minus 1.",
        stage=2,
        source=BALANCE,
    ),
    _layer(
        "load_cv",
        "1",
        "last",
        "Coefficient of variation of the experts' loads.",
        stage=2,
        source=BALANCE,
    ),
    _layer("bias_abs_max", "score", "last", "Largest |balancing bias|.", source=BALANCE),
    _layer(
        "bias_jaccard",
        "share",
        "mean",
        "Experts chosen with and without the bias: overlap.",
        worse="low",
        source=BALANCE,
    ),
    _layer(
        "spectral_norm_router",
        "×",
        "last",
        "Top singular value of the router's weights.",
        every=10,
        stage=2,
    ),
]

QUANTITIES_OF_LAYERS = [*_AMPLIFICATION, *_CURVATURE, *_CHART]
