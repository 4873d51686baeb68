"""Every quantity that geodiag records, table by table, in the order of the catalogue
(docs/metrics.md).
"""

from functools import partial

from geodiag.metrics.layer_metrics import BALANCE, CLAMP, NORMS, QUANTITIES_OF_LAYERS, V4
from geodiag.metrics.metric import metric

_step = partial(metric, "steps")
_expert = partial(metric, "experts")
_token = partial(metric, "tokens")
_domain = partial(metric, "domains")

_STEPS = [
    _step("loss", "nats/token", "mean", "Training loss of the step.", source="trainer"),
    _step(
        "grad_norm",
        "1",
        "max",
        "Norm of all gradients, before clipping where the trainer says it.",
        source="trainer",
    ),
    _step(
        "lr",
        "1",
        "last",
        "Learning rate of the first parameter group.",
        worse=None,
        source="trainer",
    ),
    _step(
        "tokens", "tokens", "sum", "Tokens trained on in this step.", worse=None, source="trainer"
    ),
    _step(
        "step_seconds",
        "s",
        ("sum", "max"),
        "Wall time from the end of one step to the end of the next.",
    ),
    _step(
        "record_seconds",
        "s",
        ("sum", "max"),
        "Time geodiag took on the training thread: end of step and probes.",
    ),
    _step(
        "routing_lag",
        "steps",
        "last",
        "Age of the weights that chose this step's experts.",
        worse=None,
        source=V4,
    ),
    _step(
        "probe_seconds",
        "s",
        ("last", "max"),
        "Time the device took for this step's probes; null without one.",
    ),
    _step(
        "data_shift",
        "1",
        "mean",
        "1 − cosine of the batch's mean input embedding to its running mean: another kind of data.",
    ),
    _step(
        "spike_score",
        "robust σ",
        ("last", "max"),
        "How far the loss lies above its own trend.",
        healthy=(None, 6.0),
    ),
    _step(
        "stage1_score",
        "robust z",
        ("last", "max"),
        "Local curvature: worst layer against its own past.",
        stage=1,
    ),
    _step(
        "stage2_score",
        "robust z",
        ("last", "max"),
        "Chart inconsistency: worst layer against its own past.",
        stage=2,
    ),
    _step(
        "stage3_score",
        "robust z",
        ("last", "max"),
        "Amplification: worst layer against its own past.",
        stage=3,
    ),
]

_EXPERTS = [
    _expert(
        "load",
        "share",
        ("sum", "mean"),
        "Share of the layer's assignments that went to this expert.",
        worse=None,
        source=BALANCE,
    ),
    _expert(
        "gate_mass",
        "share",
        ("sum", "mean"),
        "Share of the layer's gate weights that went to this expert.",
        worse=None,
    ),
    _expert(
        "act_rms",
        "1",
        ("last", "mean"),
        "RMS of the expert's gated activations.",
        stage=1,
        source=NORMS,
    ),
    _expert("act_amax", "1", "max", "Largest |activation| of the expert.", stage=1),
    _expert(
        "clamp_hits", "hits", "sum", "Clamped elements in the expert, all three kinds.", stage=1
    ),
    _expert(
        "curvature",
        "1",
        ("last", "mean"),
        "Curvature at the probe tokens that chose this expert, mean.",
        every=50,
        stage=1,
    ),
]

_TOKENS = [
    _token("norm", "1", "last", "‖X‖_F of the token's streams after the site.", every=10),
    _token(
        "projection_1",
        "1",
        "last",
        "The token's streams along a fixed random direction of length 1.",
        every=10,
        worse=None,
    ),
    _token(
        "projection_2",
        "1",
        "last",
        "The same along a second direction, at a right angle to the first.",
        every=10,
        worse=None,
    ),
    _token(
        "margin", "score", "last", "Last chosen over best rejected expert.", every=10, worse="low"
    ),
    _token(
        "flipped",
        "share",
        "last",
        "Share of the token's experts that changed since the last probe.",
        every=10,
    ),
]

_DOMAINS = [
    _domain(
        "loss",
        "nats/token",
        "mean",
        "Training loss on the step's sequences of this domain.",
        source="trainer",
    ),
    _domain(
        "tokens",
        "tokens",
        "sum",
        "Tokens of this domain in the step.",
        worse=None,
        source="trainer",
    ),
    _domain(
        "flip_rate",
        "share",
        ("last", "mean"),
        "`flip_rate` of the probe tokens of this domain, mean over learned routers.",
        every=10,
        stage=2,
    ),
    _domain(
        "clamp_gate_rate",
        "share",
        ("last", "mean"),
        "`clamp_gate_rate` of the probe tokens of this domain, all layers.",
        every=10,
        **CLAMP,
    ),
]

QUANTITIES = [*_STEPS, *QUANTITIES_OF_LAYERS, *_EXPERTS, *_TOKENS, *_DOMAINS]
