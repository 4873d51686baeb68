"""Routing on the device, 16 tokens a program: affinity, top-k, gate weights and diagnostics.

s = √softplus(z), the K best of s + bias are chosen, and w_k = scale · s_k / Σ_chosen s (arXiv
2606.19348 and 2408.15664). All E affinities of a token are in registers once, so entropy, margin
and flips cost no further read.
"""

# Kernel bodies are Triton code: tuples grow by concatenation, and arguments are pointers.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

# T tokens, E experts, EP their padded number, K experts per token


@triton.jit
def _affinity(z):
    """√softplus(z), and its derivative σ(z) / (2 √softplus(z)).

    For small e^z, log(1 + e^z) would round to 0, so its series is used. Where softplus underflows,
    the derivative would be 0/0: softplus is held at the smallest normal number, and the derivative
    is 0.
    """
    e = tl.exp(-tl.abs(z))
    log1p = tl.where(e < 1e-4, e * (1 - 0.5 * e), tl.log(1 + e))
    soft = tl.where(z > 0, z, 0.0) + log1p
    held = soft < 1.1754943508222875e-38
    score = tl.sqrt(tl.where(held, 1.1754943508222875e-38, soft)) + 0.0 * z
    return score, tl.where(held, 0.0, 0.5 * tl.sigmoid(z) / score)


@triton.jit(do_not_specialize=["T"])
def route_fwd(
    logits_ptr,
    bias_ptr,
    before_ptr,
    given_ptr,
    scores_ptr,
    ids_ptr,
    weights_ptr,
    per_token_ptr,
    load_ptr,
    T,
    scale,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    live = t < T
    inside = live[:, None] & (e < E)[None, :]
    score, _ = _affinity(
        tl.load(logits_ptr + t[:, None] * E + e[None, :], inside, 0.0).to(tl.float32)
    )
    tl.store(scores_ptr + t[:, None] * E + e[None, :], score, inside)

    # A NaN ranks first, as in torch.topk: ids stay valid, and the gate weights become NaN.
    biased = score + tl.load(bias_ptr + e, e < E, 0.0)[None, :]
    biased = tl.where(biased == biased, biased, float("inf"))
    left = tl.where((e < E)[None, :], biased, float("-inf"))
    chosen_sum = tl.zeros((BT,), tl.float32)
    flipped = tl.zeros((BT,), tl.float32)
    taken = tl.zeros((BT, EP), tl.int32)
    last = tl.full((BT,), float("inf"), tl.float32)
    picks = ()
    for k in tl.static_range(K):
        if given_ptr is not None:
            pick = tl.load(given_ptr + t * K + k, live, 0).to(tl.int32)
        else:
            pick = tl.argmax(left, 1)
        picks = picks + (pick,)
        mine = e[None, :] == pick[:, None]
        last = tl.minimum(last, tl.max(tl.where(mine, biased, float("-inf")), 1))
        chosen_sum += tl.sum(tl.where(mine, score, 0.0), 1)
        taken += mine.to(tl.int32)
        left = tl.where(mine, float("-inf"), left)
        tl.store(ids_ptr + t * K + k, pick.to(tl.int64), live)
        if before_ptr is not None:
            known = tl.zeros((BT,), tl.int32)
            for j in tl.static_range(K):
                known += (tl.load(before_ptr + t * K + j, live, -1).to(tl.int32) == pick).to(
                    tl.int32
                )
            flipped += tl.where(known == 0, 1.0 / K, 0.0)
    norm = scale / (chosen_sum + 1e-20)
    for k in tl.static_range(K):
        mine = e[None, :] == picks[k][:, None]
        tl.store(weights_ptr + t * K + k, tl.sum(tl.where(mine, score, 0.0), 1) * norm, live)

    rejected = tl.max(tl.where((taken == 0) & (e < E)[None, :], biased, float("-inf")), 1)
    total = tl.sum(tl.where((e < E)[None, :], score, 0.0), 1)
    share = score / total[:, None]
    entropy = (
        -tl.sum(tl.where((e < E)[None, :] & (share > 0), share * tl.log(share), 0.0), 1)
        + 0.0 * total
    )
    tl.store(per_token_ptr + t * 3, entropy, live)
    tl.store(per_token_ptr + t * 3 + 1, last - rejected + 0.0 * total, live)
    tl.store(per_token_ptr + t * 3 + 2, flipped, live)
    # Integer sums do not depend on the order of the atomics, so the load is deterministic.
    count = tl.sum(tl.where(live[:, None], taken, 0), 0)
    tl.atomic_add(load_ptr + e, count, (e < E) & (count > 0))


@triton.jit(do_not_specialize=["T"])
def route_bwd(
    logits_ptr,
    ids_ptr,
    d_scores_ptr,
    d_weights_ptr,
    d_logits_ptr,
    T,
    scale,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    live = t < T
    inside = live[:, None] & (e < E)[None, :]
    score, slope = _affinity(
        tl.load(logits_ptr + t[:, None] * E + e[None, :], inside, 0.0).to(tl.float32)
    )
    d = tl.zeros((BT, EP), tl.float32)
    if d_scores_ptr is not None:
        d += tl.load(d_scores_ptr + t[:, None] * E + e[None, :], inside, 0.0)
    if d_weights_ptr is not None:
        # w_k = scale·s_k/S: ∂L/∂s_k = scale·(d_k − Σ_j d_j s_j/S)/S over the chosen.
        taken = tl.zeros((BT, EP), tl.float32)
        given = tl.zeros((BT, EP), tl.float32)
        for k in tl.static_range(K):
            mine = e[None, :] == tl.load(ids_ptr + t * K + k, live, 0).to(tl.int32)[:, None]
            taken += mine.to(tl.float32)
            given += tl.where(mine, tl.load(d_weights_ptr + t * K + k, live, 0.0)[:, None], 0.0)
        total = tl.sum(taken * score, 1) + 1e-20
        mean = tl.sum(given * score, 1) / total
        d += taken * (given - mean[:, None]) * (scale / total)[:, None]
    tl.store(d_logits_ptr + t[:, None] * E + e[None, :], d * slope, inside)
