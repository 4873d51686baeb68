"""Groups: metrics that are measured together, so that what is not due costs nothing."""

from collections.abc import Set

from torch import Tensor

_STREAMS = "stream_amax stream_rms transport_gain_fwd transport_gain_fwd_max transport_gain_bwd branch_share"
_GAINS = (
    "amax_gain_fwd amax_gain_bwd amax_gain_fwd_max amax_gain_bwd_max gain_fwd_min gain_bwd_min "
    "composite_gain_fwd composite_gain_fwd_min composite_gain_fwd_max "
    "composite_gain_bwd composite_gain_bwd_min composite_gain_bwd_max "
    "amax_gain_fwd_of_mean amax_gain_bwd_of_mean gain_fwd_min_of_mean gain_bwd_min_of_mean "
    "composite_gain_fwd_of_mean composite_gain_bwd_of_mean "
    "composite_gain_fwd_min_of_mean composite_gain_bwd_min_of_mean early_signal_share "
    "spectral_norm_res spectral_norm_res_max spectral_norm_product "
    "sinkhorn_residual res_logit_min res_logit_max post_concentration"
)
_ROUTERS = (
    "flip_rate_router flip_rate_anticipatory router_margin_p01 router_margin_p10 router_margin_mean router_entropy "
    "max_vio load_cv bias_abs_max bias_jaccard"
)
_EXPERTS = (
    "clamp_gate_rate clamp_up_high_rate clamp_up_low_rate gate_amax up_amax act_amax "
    "expert_norm_max_median expert_norm_min_median"
)


def _of(table: str, names: str) -> frozenset[str]:
    return frozenset(f"{table}.{name}" for name in names.split())


TAPPED: dict[str, frozenset[str]] = {
    "streams": _of("layers", _STREAMS),
    "gains": _of("layers", _GAINS) | {"matrices"},
    "routers": _of("layers", _ROUTERS) | _of("experts", "load gate_mass"),
    "experts": _of("layers", _EXPERTS) | _of("experts", "act_rms act_amax clamp_hits"),
    "gradients": _of("layers", "grad_norm"),
}
"""Measured in the training step itself, by its hooks."""

PROBED: dict[str, frozenset[str]] = {
    "flips": _of("layers", "flip_rate flip_top1 flip_any"),
    "tear": _of("layers", "tear tear_flipped"),
    "tokens": _of("tokens", "norm projection_1 projection_2 margin flipped"),
    "domains": _of("domains", "flip_rate clamp_gate_rate"),
    "attention": _of("layers", "attn_logit_max"),
    "curvature": _of("layers", "curvature curvature_max") | _of("experts", "curvature"),
    "growth": _of("layers", "perturbation_growth"),
    "spectra": _of(
        "layers", "spectral_norm_router spectral_norm_gate spectral_norm_up spectral_norm_down"
    ),
}
"""Measured at the end of a step, on the probe batch or the weights."""

COMPARED = frozenset({"flips", "tear", "tokens", "domains"})
"""Probes that hold the choice of experts against the last such probe's."""


def needed(groups: dict[str, frozenset[str]], due: Set[str]) -> frozenset[str]:
    """The groups of which some metric is due."""
    return frozenset(name for name, metrics in groups.items() if metrics & due)


_SPECIAL = {
    "maps": "matrices",
    "load": "experts.load",
    "gate_mass": "experts.gate_mass",
    "expert/elements": "experts.act_rms",  # tells which experts saw no token
}
_AT_LAYERS = ("site", "router", "act", "attn", "layer")


def due_only(values: dict[str, Tensor], due: Set[str]) -> dict[str, Tensor]:
    """What of a step's values is to be recorded at this step."""
    return {
        key: value for key, value in values.items() if _metric(key) is None or _metric(key) in due
    }


def _metric(key: str) -> str | None:
    """The "table.metric" that a value belongs to; None for what has no cadence of its own."""
    group, _, name = key.partition("/")
    if group in _AT_LAYERS:
        return f"layers.{name}"
    return _SPECIAL.get(key) or (f"experts.{name}" if group == "expert" else None)
