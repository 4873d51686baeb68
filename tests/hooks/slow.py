"""The catalogue's definitions written out slowly, token by token, in float64: what the fast code is
held to.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_amax_fwd(res: Array) -> float:
    """Mean over tokens of max_i |Σ_j H[i, j]|."""
    return float(np.mean([max(abs(sum(row)) for row in h) for h in res]))


def mean_amax_bwd(res: Array) -> float:
    """Mean over tokens of max_j |Σ_i H[i, j]|."""
    return mean_amax_fwd(res.transpose(0, 2, 1))


def mean_gain_fwd_min(res: Array) -> float:
    return float(np.mean([min(abs(sum(row)) for row in h) for h in res]))


def composites_fwd(res: Array) -> Array:
    """(S, T, N, N): P_s = H_s … H_1 of every token, multiplied out."""
    out = np.empty_like(res)
    for t in range(res.shape[1]):
        p = np.eye(res.shape[2])
        for s in range(len(res)):
            p = res[s, t] @ p
            out[s, t] = p
    return out


def composites_bwd(res: Array) -> Array:
    """(S, T, N, N): Q_s = H_S … H_s of every token, multiplied out."""
    out = np.empty_like(res)
    for t in range(res.shape[1]):
        q = np.eye(res.shape[2])
        for s in reversed(range(len(res))):
            q = q @ res[s, t]
            out[s, t] = q
    return out


def sinkhorn_residual(res: Array) -> float:
    """Largest distance of any token's row or column sum from 1."""
    worst = 0.0
    for h in res:
        for i in range(len(h)):
            worst = max(worst, abs(sum(h[i, :]) - 1), abs(sum(h[:, i]) - 1))
    return worst


def branch_share(res: Array, x: Array, post: Array, f: Array) -> float:
    """Mean over tokens of b / (b + r): b = ‖H_postᵀ F‖_F, r = ‖H_res X‖_F."""
    shares = []
    for h, streams, p, out in zip(res, x, post, f, strict=True):
        b, r = np.linalg.norm(np.outer(p, out)), np.linalg.norm(h @ streams)
        shares.append(b / (b + r))
    return float(np.mean(shares))


def transport(before: Array, after: Array) -> tuple[float, float]:
    """Mean and largest over tokens of ‖X'‖_F / ‖X‖_F."""
    growth = [np.linalg.norm(b) / np.linalg.norm(a) for a, b in zip(before, after, strict=True)]
    return float(np.mean(growth)), float(np.max(growth))


def flip_rate(now: list[list[int]], then: list[list[int]]) -> float:
    """Mean over tokens of 1 − |A ∩ B| / K."""
    return float(
        np.mean([1 - len(set(a) & set(b)) / len(a) for a, b in zip(now, then, strict=True)])
    )


def flip_any(now: list[list[int]], then: list[list[int]]) -> float:
    return float(np.mean([set(a) != set(b) for a, b in zip(now, then, strict=True)]))


def jaccard(a: list[list[int]], b: list[list[int]]) -> float:
    return float(
        np.mean([len(set(x) & set(y)) / len(set(x) | set(y)) for x, y in zip(a, b, strict=True)])
    )


def margins(biased: Array, k: int) -> Array:
    """Each token's last chosen score minus its best rejected one."""
    ordered = [sorted(row, reverse=True) for row in biased]
    return np.array([row[k - 1] - row[k] for row in ordered])


def entropy(scores: Array) -> float:
    p = scores / scores.sum(1, keepdims=True)
    return float(np.mean([-sum(x * np.log(x) for x in row if x > 0) for row in p]))


def max_vio(load: Array) -> float:
    return float(max(load) / np.mean(load) - 1)


def load_cv(load: Array) -> float:
    return float(np.std(load) / np.mean(load))


def clamp_rates(gate: Array, up: Array, limit: float) -> tuple[float, float, float]:
    """Shares of elements strictly above the gate limit, above the up limit, below minus the up
    limit.
    """
    return float(np.mean(gate > limit)), float(np.mean(up > limit)), float(np.mean(up < -limit))


def expert_rms(act: Array, expert: list[int], experts: int) -> list[float | None]:
    """RMS of each expert's activations; None for an expert that saw no token."""
    rows = [[a for a, e in zip(act, expert, strict=True) if e == i] for i in range(experts)]
    return [float(np.sqrt(np.mean(np.square(r)))) if r else None for r in rows]
