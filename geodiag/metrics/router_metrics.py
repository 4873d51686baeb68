"""Metrics of routers: flips, margins, entropy, loads, tear.

Stage 2 of the tear cascade, routing instability: the router's choice no longer fits the stream.
Tables `layers` (one value a router) and `experts` (one value an expert).
"""

from functools import partial

from geodiag.metrics.metric import Chart, metric
from geodiag.metrics.sources import ANTICIPATORY, LOAD_BALANCE

_router = partial(metric, "layers", group="routers", place="router", part="router")
_probe = partial(metric, "layers", place="router", part="router", every=10, stage=2)
_flip = partial(_probe, group="flips")
_expert = partial(metric, "experts", group="routers", place="router", part="router", sides="both")
_page = partial(Chart, page="routing")

OF_LAYERS = [
    _flip(
        "flip_rate",
        "share",
        ("last", "mean"),
        "Share of chosen experts that changed since the last probe, fixed tokens.",
        headline="Stage 2",
        live=True,
        chart=_page(menu="flip rate"),
    ),
    _flip(
        "flip_top1",
        "share",
        ("last", "mean"),
        "Probe tokens whose first expert changed.",
        headline="Stage 2",
        chart=_page(menu="top-1"),
    ),
    _flip(
        "flip_any",
        "share",
        ("last", "mean"),
        "Probe tokens with any of their K experts changed.",
        chart=_page(menu="any of K"),
    ),
    _probe(
        "tear",
        "1",
        ("last", "mean"),
        "‖F(x; A) − F(x; A_then)‖ / ‖F(x; A)‖, F the expert block, A_then the last probe's; "
        "mean of probe tokens.",
        group="tear",
    ),
    _probe(
        "tear_flipped",
        "1",
        ("last", "mean"),
        "The same, over the tokens whose choice changed.",
        group="tear",
        part=None,
    ),
    _router(
        "flip_rate_router",
        "share",
        "mean",
        "Flips that the router's own update alone causes.",
        stage=2,
        headline="Stage 2",
        live=True,
        chart=_page(menu="router alone"),
    ),
    _router(
        "flip_rate_anticipatory",
        "share",
        "mean",
        "Cached against live choice while anticipatory routing is on.",
        worse=None,
        part=None,
        source=ANTICIPATORY,
        chart=_page(menu="anticipatory"),
    ),
    _router(
        "router_margin_p01",
        "score",
        ("last", "mean"),
        "Last chosen over best rejected expert: 1st percentile.",
        worse="low",
        part=None,
        chart=_page(panel="margin", legend="p01"),
    ),
    _router(
        "router_margin_p10",
        "score",
        ("last", "mean"),
        "Last chosen over best rejected expert: 10th percentile.",
        worse="low",
        sides="both",
        chart=_page(panel="margin", legend="p10"),
    ),
    _router(
        "router_margin_mean",
        "score",
        "mean",
        "Last chosen over best rejected expert: mean.",
        worse="low",
        sides="both",
        chart=_page(panel="margin", legend="mean"),
    ),
    _router(
        "router_entropy",
        "nats",
        "mean",
        "Entropy of the normalised scores, mean over tokens.",
        worse="low",
        sides="both",
        stage=2,
        headline="Stage 2",
        chart=_page(panel="entropy", legend="entropy"),
    ),
    _router(
        "max_vio",
        "×",
        "last",
        "Busiest expert over the mean load, minus 1.",
        stage=2,
        headline="Stage 2",
        source=LOAD_BALANCE,
        chart=_page(panel="MaxVio", legend="MaxVio"),
    ),
    _router(
        "load_cv",
        "1",
        "last",
        "Coefficient of variation of the experts' loads.",
        stage=2,
        source=LOAD_BALANCE,
    ),
    _router("bias_abs_max", "score", "last", "Largest |balancing bias|.", source=LOAD_BALANCE),
    _router(
        "bias_jaccard",
        "share",
        "mean",
        "Experts chosen with and without the bias: overlap.",
        worse="low",
        sides="both",
        source=LOAD_BALANCE,
    ),
    _probe(
        "spectral_norm_router",
        "×",
        "last",
        "Top singular value of the router's weights.",
        group="spectra",
    ),
]

OF_EXPERTS = [
    _expert(
        "load",
        "share",
        ("sum", "mean"),
        "Share of the layer's assignments that went to this expert.",
        worse=None,
        source=LOAD_BALANCE,
        chart=_page(menu="load"),
    ),
    _expert(
        "gate_mass",
        "share",
        ("sum", "mean"),
        "Share of the layer's gate weights that went to this expert.",
        worse=None,
        chart=_page(menu="gate mass"),
    ),
]
