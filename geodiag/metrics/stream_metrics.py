"""Metrics of the residual streams, of the gradients and of the updates of the weights.

Stage 3 of the tear cascade, amplification. One value a residual site (`attn`, `ffn`) unless the
declaration names another place.
"""

from functools import partial

from geodiag.metrics.metric import Chart, metric

_stream = partial(metric, "layers", group="streams", place="site")
_gain_page = partial(Chart, page="gain")
_transport = partial(_gain_page, quantity="transport", menu="transport gain")

_STREAMS = [
    metric(
        "layers",
        "perturbation_growth",
        "×",
        ("last", "mean"),
        "‖change of the last stream‖ over ‖small random change of the stream entering the layer‖, "
        "probe tokens.",
        group="growth",
        place="layer",
        every=50,
        stage=3,
    ),
    _stream(
        "branch_share",
        "1",
        "mean",
        "How much of the update is the block's own output.",
        worse=None,
        part="write",
        chart=_gain_page(quantity="branch", menu="branch share", over="mean"),
    ),
    _stream(
        "stream_amax",
        "1",
        "max",
        "Largest |x| of the residual stream after the site.",
        healthy=(None, 65504.0),
        stage=3,
        part="stream",
        headline="Stage 3",
        chart=_gain_page(menu="stream amax", over="max"),
    ),
    _stream(
        "stream_rms",
        "1",
        "mean",
        "RMS of the residual stream after the site.",
        stage=3,
        part="stream",
        chart=_gain_page(menu="stream RMS", over="mean"),
    ),
    _stream(
        "transport_gain_fwd",
        "×",
        "mean",
        "Growth of a token's stream across the site, mean.",
        stage=3,
        part="write",
        sides="both",
        chart=_transport(over="mean"),
    ),
    _stream(
        "transport_gain_fwd_max",
        "×",
        "max",
        "Growth of a token's stream across the site, worst token.",
        part="write",
        chart=_transport(over="max"),
    ),
    _stream(
        "transport_gain_bwd",
        "×",
        "mean",
        "Growth of the gradient across the site, towards the input.",
        stage=3,
        part="gradient",
        headline="Stage 3",
        chart=_transport(over="mean"),
    ),
    metric(
        "layers",
        "grad_norm",
        "1",
        ("mean", "max"),
        "Gradient norm of the layer's parameters.",
        group="parameters",
        place="layer",
        stage=3,
        part="gradient",
        chart=_gain_page(quantity="grad", menu="layer gradient norm", over="mean"),
    ),
]

_UPDATES = [
    metric(
        "layers",
        "update_ratio",
        "1",
        ("last", "mean"),
        "‖Δθ‖ / ‖θ‖ of the layer's own parameters, Δθ their change in this optimizer step.",
        group="parameters",
        place="layer",
        every=10,
        chart=_gain_page(menu="update ratio", over="mean"),
    ),
    metric(
        "layers",
        "update_ratio_router",
        "1",
        ("last", "mean"),
        "The same, of the router's parameters.",
        group="parameters",
        place="router",
        every=10,
    ),
    metric(
        "layers",
        "update_ratio_experts",
        "1",
        ("last", "mean"),
        "The same, of the routed experts' parameters.",
        group="parameters",
        place="experts",
        every=10,
    ),
]

STREAM_METRICS = [*_STREAMS, *_UPDATES]
