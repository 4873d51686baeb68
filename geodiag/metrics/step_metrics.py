"""Metrics of a step, of traced tokens and of domains (tables `steps`, `tokens`, `domains`)."""

from functools import partial

from geodiag.metrics.metric import metric
from geodiag.metrics.sources import ANTICIPATORY, DEEPSEEK_V4

_step = partial(metric, "steps")
_token = partial(metric, "tokens", group="tokens", place="token", every=10)
_domain = partial(metric, "domains", place="sequence")
_probe = partial(_domain, group="domains", every=10)
_trainer = partial(_step, source="trainer")

OF_STEPS = [
    _trainer("loss", "nats/token", "mean", "Training loss of the step.", headline="Outcome"),
    _trainer(
        "grad_norm",
        "1",
        "max",
        "Norm of all gradients, before clipping where the trainer says it.",
        headline="Outcome",
    ),
    _trainer("lr", "1", "last", "Learning rate of the first parameter group.", worse=None),
    _trainer("tokens", "tokens", "sum", "Tokens trained on in this step.", worse=None),
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
        source=ANTICIPATORY,
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
        part="data",
    ),
    _step(
        "spike_score",
        "robust σ",
        ("last", "max"),
        "How far the loss is above its own trend.",
        healthy=(None, 6.0),
        headline="Outcome",
    ),
    _step(
        "stage1_score",
        "robust z",
        ("last", "max"),
        "Local curvature: worst layer against its own past.",
        stage=1,
        headline="Stage 1",
    ),
    _step(
        "stage2_score",
        "robust z",
        ("last", "max"),
        "Routing instability: worst layer against its own past.",
        stage=2,
        headline="Stage 2",
    ),
    _step(
        "stage3_score",
        "robust z",
        ("last", "max"),
        "Amplification: worst layer against its own past.",
        stage=3,
        headline="Stage 3",
    ),
]

OF_TOKENS = [
    _token("norm", "1", "last", "‖X‖_F of the token's streams after the site."),
    _token(
        "projection_1",
        "1",
        "last",
        "The token's streams along a fixed random direction of length 1.",
        worse=None,
    ),
    _token(
        "projection_2",
        "1",
        "last",
        "The same along a second direction, at a right angle to the first.",
        worse=None,
    ),
    _token("margin", "score", "last", "Last chosen over best rejected expert.", worse="low"),
    _token(
        "flipped",
        "share",
        "last",
        "Share of the token's experts that changed since the last probe.",
    ),
]

OF_DOMAINS = [
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
    _probe(
        "flip_rate",
        "share",
        ("last", "mean"),
        "`flip_rate` of the probe tokens of this domain, mean over learned routers.",
        stage=2,
    ),
    _probe(
        "clamp_gate_rate",
        "share",
        ("last", "mean"),
        "`clamp_gate_rate` of the probe tokens of this domain, all layers.",
        stage=1,
        source=DEEPSEEK_V4,
    ),
]
