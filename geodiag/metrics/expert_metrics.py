"""Metrics of experts and attention: clamp hits, extreme activations, curvature, weight norms.

Stage 1 of the tear cascade, local curvature. Tables `layers` (one value a layer's experts) and
`experts` (one value an expert).
"""

from functools import partial

from geodiag.metrics.metric import Chart, metric
from geodiag.metrics.sources import DEEPSEEK_V4, EXPERT_NORMS

_layer = partial(metric, "layers", group="experts", place="experts", part="experts")
_clamp = partial(_layer, stage=1, headline="Stage 1", source=DEEPSEEK_V4)
_probe = partial(metric, "layers", place="experts", part="experts", stage=1)
_expert = partial(metric, "experts", group="experts", place="experts", part="experts", stage=1)
_page = partial(Chart, page="activations")

OF_LAYERS = [
    _clamp(
        "clamp_gate_rate",
        "share",
        "mean",
        "Gate pre-activations above the SwiGLU limit.",
        live=True,
        chart=_page(menu="gate clamped", panel="clamped", legend="gate"),
    ),
    _clamp(
        "clamp_up_high_rate",
        "share",
        "mean",
        "Up pre-activations above the limit.",
        chart=_page(menu="up clamped, high", panel="clamped", legend="up high"),
    ),
    _clamp(
        "clamp_up_low_rate",
        "share",
        "mean",
        "Up pre-activations below minus the limit.",
        chart=_page(menu="up clamped, low", panel="clamped", legend="up low"),
    ),
    _layer(
        "gate_amax",
        "1",
        "max",
        "Largest |gate| before the clamp.",
        stage=1,
        chart=_page(menu="gate amax", panel="amax", legend="gate"),
    ),
    _layer(
        "up_amax",
        "1",
        "max",
        "Largest |up| before the clamp.",
        stage=1,
        chart=_page(menu="up amax", panel="amax", legend="up"),
    ),
    _layer(
        "act_amax",
        "1",
        "max",
        "Largest |activation| of the gated product.",
        stage=1,
        headline="Stage 1",
        chart=_page(menu="activation amax", panel="amax", legend="activation"),
    ),
    _layer(
        "expert_norm_max_median",
        "×",
        ("last", "max"),
        "Largest expert's activation RMS over the median expert's.",
        stage=1,
        headline="Stage 1",
        source=EXPERT_NORMS,
        chart=_page(menu="expert norm, max / median", panel="max / median", legend="experts"),
    ),
    _layer(
        "expert_norm_min_median",
        "×",
        ("last", "min"),
        "Smallest expert's activation RMS over the median expert's.",
        worse="low",
        part=None,
        source=EXPERT_NORMS,
        chart=_page(menu="expert norm, min / median"),
    ),
    _probe(
        "curvature",
        "1",
        ("last", "mean"),
        "‖f(x+εv) − 2f(x) + f(x−εv)‖ / ‖f(x+εv) − f(x−εv)‖, f the expert block, routing held; "
        "mean of probe tokens.",
        group="curvature",
        every=50,
    ),
    _probe(
        "curvature_max",
        "1",
        ("last", "max"),
        "The same, worst probe token.",
        group="curvature",
        every=50,
        part=None,
    ),
    _probe(
        "attn_logit_max",
        "logit",
        ("last", "max"),
        "Largest attention logit of sampled queries of the probe batch.",
        group="attention",
        place="attention",
        part="attention",
        every=10,
    ),
    _probe(
        "spectral_norm_gate",
        "×",
        "last",
        "Top singular value of the gate weights, worst expert.",
        group="spectra",
        every=10,
        chart=_page(menu="gate weights' norm"),
    ),
    _probe(
        "spectral_norm_up",
        "×",
        "last",
        "Top singular value of the up weights, worst expert.",
        group="spectra",
        every=10,
        chart=_page(menu="up weights' norm"),
    ),
    _probe(
        "spectral_norm_down",
        "×",
        "last",
        "Top singular value of the down weights, worst expert.",
        group="spectra",
        every=10,
        chart=_page(menu="down weights' norm"),
    ),
]

OF_EXPERTS = [
    _expert(
        "act_rms",
        "1",
        ("last", "mean"),
        "RMS of the expert's gated activations.",
        sides="both",
        source=EXPERT_NORMS,
        chart=_page(menu="RMS"),
    ),
    _expert(
        "act_amax",
        "1",
        "max",
        "Largest |activation| of the expert.",
        chart=_page(menu="amax"),
    ),
    _expert(
        "clamp_hits",
        "hits",
        "sum",
        "Clamped elements in the expert, all three kinds.",
        chart=_page(menu="clamp hits"),
    ),
    _expert(
        "curvature",
        "1",
        ("last", "mean"),
        "Curvature at the probe tokens that chose this expert, mean.",
        group="curvature",
        every=50,
    ),
]
