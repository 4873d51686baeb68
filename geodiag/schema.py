"""The shared vocabulary: every metric by name, and the Arrow schema of every table.

Metric names and definitions follow the catalogue in docs/metrics.md, which is printed from this file.
A null in a table means "not sampled" or "not applicable"; a NaN is a measured NaN.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

SCHEMA_VERSION = 1

SITES = ("attn", "ffn", "block")
ROUTING_MODES = ("off", "warmup", "on", "drain")
MAPS = ("pre", "post", "res")

Reduction = Literal["mean", "max", "min", "sum", "last"]
MHC = "arXiv 2512.24880 §3.1"
V4 = "arXiv 2606.19348 §4.2.3"
V4_CLAMP = "arXiv 2606.19348"
FIG8 = "arXiv 2512.24880 Fig. 8"
NORMS = "arXiv 2602.10604"
BALANCE = "arXiv 2408.15664"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One recorded quantity: what it is called, measured in, and how it is put together."""

    name: str
    table: str
    unit: str
    micro: Reduction
    """How values of several micro-batches become one. Means are weighted by tokens."""
    ranks: Reduction
    every: int = 1
    """Default cadence, in steps."""
    healthy: tuple[float | None, float | None] | None = None
    """The range a healthy run stays in, where there is one for all models."""
    worse: Literal["high", "low"] | None = "high"
    """Which end is the bad one, so that `show` can name the worst layer."""
    stage: int | None = None
    """The stage of the tear cascade it is evidence for: 1 curvature, 2 chart, 3 amplification."""
    help: str
    source: str = "geodiag"


def _metrics(table: str, rows: Iterable[dict]) -> list[Metric]:
    return [Metric(table=table, **row) for row in rows]


def _m(name: str, unit: str, reduce: Reduction | tuple[Reduction, Reduction], help: str, **more: Any) -> dict:
    micro, ranks = (reduce, reduce) if isinstance(reduce, str) else reduce
    return dict(name=name, unit=unit, micro=micro, ranks=ranks, help=help, **more)


_STEPS = [
    _m("loss", "nats/token", "mean", "Training loss of the step.", source="trainer"),
    _m("grad_norm", "1", "max", "Norm of all gradients, before clipping where the trainer says it.", source="trainer"),
    _m("lr", "1", "last", "Learning rate of the first parameter group.", worse=None, source="trainer"),
    _m("tokens", "tokens", "sum", "Tokens trained on in this step.", worse=None, source="trainer"),
    _m("step_seconds", "s", ("sum", "max"), "Wall time from the end of one step to the end of the next."),
    _m("record_seconds", "s", ("sum", "max"), "Time geodiag took on the training thread: end of step and probes."),
    _m("routing_lag", "steps", "last", "Age of the weights that chose this step's experts.", worse=None, source=V4),
    _m("spike_score", "robust σ", ("last", "max"), "How far the loss lies above its own trend.", healthy=(None, 6.0)),
    _m("stage1_score", "robust z", ("last", "max"), "Local curvature: worst layer against its own past.", stage=1),
    _m("stage2_score", "robust z", ("last", "max"), "Chart inconsistency: worst layer against its own past.", stage=2),
    _m("stage3_score", "robust z", ("last", "max"), "Amplification: worst layer against its own past.", stage=3),
]

_GAIN = {"stage": 3, "source": MHC}
_SHRINK = {"worse": "low", "source": MHC}
_CLAMP = {"stage": 1, "source": V4_CLAMP}
_AMPLIFICATION = [
    _m("amax_gain_fwd", "×", "mean", "Largest |row sum| of H_res, mean over tokens.", **_GAIN),
    _m("amax_gain_bwd", "×", "mean", "Largest |column sum| of H_res, mean over tokens.", **_GAIN),
    _m("amax_gain_fwd_max", "×", "max", "Largest |row sum| of H_res, worst token.", **_GAIN),
    _m("amax_gain_bwd_max", "×", "max", "Largest |column sum| of H_res, worst token.", **_GAIN),
    _m("gain_fwd_min", "×", "mean", "Smallest |row sum| of H_res, mean over tokens: attenuation.", **_SHRINK),
    _m("gain_bwd_min", "×", "mean", "Smallest |column sum| of H_res, mean over tokens: attenuation.", **_SHRINK),
    _m("composite_gain_fwd", "×", "mean", "Amax gain of all maps up to here, mean over tokens.", **_GAIN),
    _m("composite_gain_fwd_min", "×", "mean", "Smallest |row sum| of the composite, mean over tokens.", **_SHRINK),
    _m("composite_gain_fwd_max", "×", "max", "Amax gain of all maps up to here, worst token.", **_GAIN),
    _m("composite_gain_bwd", "×", "mean", "Amax gain of all maps from here to the end, mean over tokens.", **_GAIN),
    _m("composite_gain_bwd_min", "×", "mean", "Smallest |column sum| of the composite, mean over tokens.", **_SHRINK),
    _m("composite_gain_bwd_max", "×", "max", "Amax gain of all maps from here to the end, worst token.", **_GAIN),
    _m("amax_gain_fwd_of_mean", "×", "mean", "Amax gain of the token-mean map (a second definition).", source=FIG8),
    _m("amax_gain_bwd_of_mean", "×", "mean", "Backward Amax gain of the token-mean map.", source=FIG8),
    _m("composite_gain_fwd_of_mean", "×", "mean", "Amax gain of the product of token-mean maps.", source=FIG8),
    _m("composite_gain_bwd_of_mean", "×", "mean", "Backward Amax gain of the product of token-mean maps.", source=FIG8),
    _m(
        "early_signal_share",
        "1",
        "mean",
        "Product of the smallest gains of the mean maps from the first site to here.",
        worse="low",
    ),
    _m("spectral_norm_res", "×", "mean", "‖H_res‖₂, mean over tokens.", **_GAIN),
    _m("spectral_norm_res_max", "×", "max", "‖H_res‖₂, worst token.", **_GAIN),
    _m("sinkhorn_residual", "1", "max", "Largest |row or column sum − 1|: what Sinkhorn left.", source=MHC),
    _m("res_logit_min", "logit", "min", "Smallest entry of H_res before its projection.", worse="low", source=MHC),
    _m("res_logit_max", "logit", "max", "Largest entry of H_res before its projection: saturation.", source=MHC),
    _m("branch_share", "1", "mean", "How much of the update is the block's own output.", worse=None),
    _m("post_concentration", "×", "mean", "Largest over mean H_post: N = all mass on one stream.", worse=None),
    _m(
        "stream_amax",
        "1",
        "max",
        "Largest |x| of the residual stream after the site.",
        healthy=(None, 65504.0),
        stage=3,
    ),
    _m("stream_rms", "1", "mean", "RMS of the residual stream after the site.", stage=3),
    _m("transport_gain_fwd", "×", "mean", "Growth of a token's stream across the site, mean.", stage=3),
    _m("transport_gain_fwd_max", "×", "max", "Growth of a token's stream across the site, worst token."),
    _m("transport_gain_bwd", "×", "mean", "Growth of the gradient across the site, towards the input.", stage=3),
    _m("grad_norm", "1", ("mean", "max"), "Gradient norm of the layer's parameters.", stage=3),
]

_CURVATURE = [
    _m("clamp_gate_rate", "share", "mean", "Gate pre-activations above the SwiGLU limit.", **_CLAMP),
    _m("clamp_up_high_rate", "share", "mean", "Up pre-activations above the limit.", **_CLAMP),
    _m("clamp_up_low_rate", "share", "mean", "Up pre-activations below minus the limit.", **_CLAMP),
    _m("gate_amax", "1", "max", "Largest |gate| before the clamp.", stage=1),
    _m("up_amax", "1", "max", "Largest |up| before the clamp.", stage=1),
    _m("act_amax", "1", "max", "Largest |activation| of the gated product.", stage=1),
    _m(
        "expert_norm_max_median",
        "×",
        "last",
        "Largest expert's activation RMS over the median expert's.",
        stage=1,
        source=NORMS,
    ),
    _m(
        "expert_norm_min_median",
        "×",
        "last",
        "Smallest expert's activation RMS over the median expert's.",
        worse="low",
        source=NORMS,
    ),
    _m("spectral_norm_gate", "×", "last", "Top singular value of the gate weights, worst expert.", every=10, stage=1),
    _m("spectral_norm_up", "×", "last", "Top singular value of the up weights, worst expert.", every=10, stage=1),
    _m("spectral_norm_down", "×", "last", "Top singular value of the down weights, worst expert.", every=10, stage=1),
]

_CHART = [
    _m(
        "flip_rate",
        "share",
        "last",
        "Share of chosen experts that changed since the last probe, fixed tokens.",
        every=10,
        stage=2,
    ),
    _m("flip_top1", "share", "last", "Probe tokens whose first expert changed.", every=10, stage=2),
    _m("flip_any", "share", "last", "Probe tokens with any of their K experts changed.", every=10, stage=2),
    _m("flip_rate_router", "share", "mean", "Flips that the router's own update alone causes.", stage=2),
    _m(
        "flip_rate_anticipatory",
        "share",
        "mean",
        "Cached against live choice while anticipatory routing is on.",
        worse=None,
        source=V4,
    ),
    _m("router_margin_p01", "score", "last", "Last chosen over best rejected expert: 1st percentile.", worse="low"),
    _m("router_margin_p10", "score", "last", "Last chosen over best rejected expert: 10th percentile.", worse="low"),
    _m("router_margin_mean", "score", "mean", "Last chosen over best rejected expert: mean.", worse="low"),
    _m("router_entropy", "nats", "mean", "Entropy of the normalised scores, mean over tokens.", worse="low", stage=2),
    _m("max_vio", "×", "last", "Busiest expert over the mean load, minus 1.", stage=2, source=BALANCE),
    _m("load_cv", "1", "last", "Coefficient of variation of the experts' loads.", stage=2, source=BALANCE),
    _m("bias_abs_max", "score", "last", "Largest |balancing bias|.", source=BALANCE),
    _m(
        "bias_jaccard",
        "share",
        "last",
        "Experts chosen with and without the bias: overlap.",
        worse="low",
        source=BALANCE,
    ),
    _m("spectral_norm_router", "×", "last", "Top singular value of the router's weights.", every=10, stage=2),
]

_EXPERTS = [
    _m(
        "load", "share", "sum", "Share of the layer's assignments that went to this expert.", worse=None, source=BALANCE
    ),
    _m("gate_mass", "share", "sum", "Share of the layer's gate weights that went to this expert.", worse=None),
    _m("act_rms", "1", "last", "RMS of the expert's gated activations.", stage=1, source=NORMS),
    _m("act_amax", "1", "max", "Largest |activation| of the expert.", stage=1),
    _m("clamp_hits", "hits", "sum", "Clamped elements in the expert, all three kinds.", stage=1),
]

METRICS: dict[tuple[str, str], Metric] = {
    (m.table, m.name): m
    for m in (
        _metrics("steps", _STEPS)
        + _metrics("layers", _AMPLIFICATION + _CURVATURE + _CHART)
        + _metrics("experts", _EXPERTS)
    )
}
"""The registry: (table, name) → Metric."""

_RANKED = [("rank", pa.int16()), ("attempt", pa.int16()), ("step", pa.int32())]
_SITE = pa.dictionary(pa.int8(), pa.string())
_KEYS = {
    "steps": [("routing_mode", pa.dictionary(pa.int8(), pa.string()))],
    "layers": [("layer", pa.int16()), ("site", _SITE)],
    "experts": [("layer", pa.int16()), ("expert", pa.int16())],
    "matrices": [
        ("layer", pa.int16()),
        ("site", _SITE),
        ("map", pa.dictionary(pa.int8(), pa.string())),
        ("i", pa.int8()),
        ("j", pa.int8()),
        ("value", pa.float32()),
    ],
    "events": [
        ("kind", pa.string()),
        ("layer", pa.int16()),
        ("site", pa.string()),
        ("expert", pa.int16()),
        ("message", pa.string()),
        ("data", pa.string()),
        ("time", pa.float64()),
    ],
}

CATEGORIES = {"routing_mode": ROUTING_MODES, "site": SITES, "map": MAPS}
"""Fixed dictionaries of the dictionary-encoded columns, so that every batch carries the same one."""


def metrics_of(table: str) -> list[Metric]:
    """The registered metrics of one table, in catalogue order."""
    return [m for (t, _), m in METRICS.items() if t == table]


SCHEMAS: dict[str, pa.Schema] = {
    table: pa.schema(
        [pa.field(n, t, nullable=n not in ("rank", "attempt", "step")) for n, t in _RANKED + keys]
        + [pa.field(m.name, pa.float32()) for m in metrics_of(table)]
    )
    for table, keys in _KEYS.items()
}
"""Table → Arrow schema: rank, attempt, step, the table's keys, then its metrics as float32."""


def registry(counterfactual: Iterable[str] = ()) -> list[dict]:
    """The registry as plain data for run.json; names in `counterfactual` are marked as such."""
    marked = set(counterfactual)
    return [asdict(m) | {"counterfactual": m.name in marked} for m in METRICS.values()]
