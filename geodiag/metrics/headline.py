"""The metrics that say how a run stands, by what they speak of: what one screen, or one page, has
room for.
"""

KEY_METRICS = {
    "Outcome": ["loss", "grad_norm", "spike_score"],
    "Stage 1: local curvature": [
        "stage1_score",
        "clamp_gate_rate",
        "clamp_up_high_rate",
        "clamp_up_low_rate",
        "act_amax",
        "expert_norm_max_median",
    ],
    "Stage 2: chart inconsistency": [
        "stage2_score",
        "flip_rate",
        "flip_top1",
        "flip_rate_router",
        "router_entropy",
        "max_vio",
    ],
    "Stage 3: amplification": [
        "stage3_score",
        "amax_gain_fwd_max",
        "amax_gain_bwd_max",
        "composite_gain_fwd",
        "composite_gain_bwd",
        "transport_gain_bwd",
        "stream_amax",
        "sinkhorn_residual",
    ],
}
"""Heading → names in `steps` or else in `layers`; the headings of stages begin so."""
