"""The script of a synthetic run: the columns of every table as functions of the step."""

from dataclasses import dataclass

import numpy as np

from geodiag.events import Event
from geodiag.metrics.schema import SITES

# S steps, L layers, R sites (2L), E experts, N streams.


@dataclass(frozen=True, kw_only=True)
class ScriptedSpike:
    """A loss spike that starts in one expert and passes through all three stages."""

    onset: int
    layer: int
    expert: int
    rise: int = 6
    decay: float = 18.0
    leads: tuple[int, int, int] = (22, 13, 8)
    """Steps between the start of each stage and the spike of the loss."""

    def pulse(self, step_S: np.ndarray, stage: int = 0) -> np.ndarray:
        """0 before the stage begins, 1 at the loss's peak, then decaying."""
        begin = self.onset - (self.leads[stage - 1] if stage else 0)
        rising = np.clip((step_S - begin) / (self.onset + self.rise - begin), 0, 1) ** 2
        falling = np.exp(-np.clip(step_S - self.onset - self.rise, 0, None) / self.decay)
        return rising * falling

    @property
    def peak(self) -> int:
        return self.onset + self.rise

    @property
    def end(self) -> int:
        return self.onset + self.rise + int(2.2 * self.decay)


@dataclass(frozen=True, kw_only=True)
class RunScript:
    """A synthetic run: its model, its length, its spikes."""

    residual: str = "mhc"
    layers: int = 6
    experts: int = 8
    streams: int = 4
    steps: int = 600
    spikes: tuple[ScriptedSpike, ...] = ()
    probe_every: int = 10
    matrices_every: int = 50
    routing_on: tuple[tuple[int, int], ...] = ()
    """Spans of anticipatory routing, warm-up to the end of drain."""
    delay: int = 8
    token_trajectories: int = 6
    """Tokens that are followed down the layers."""
    seed: int = 0

    def rng(self, table: str, first: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, len(table), ord(table[0]), first])

    def mode(self, step: int) -> str:
        for a, b in self.routing_on:
            if a <= step < b:
                return (
                    "warmup"
                    if step < a + self.delay
                    else "drain"
                    if step >= b - self.delay
                    else "on"
                )
        return "off"

    def steps_columns(self, step_S: np.ndarray) -> dict:
        rng = self.rng("steps", int(step_S[0]))
        n = len(step_S)
        loss = 1.9 + 3.6 * np.exp(-step_S / (0.09 * self.steps)) + rng.normal(0, 0.018, n)
        norm = 0.9 + 1.6 * np.exp(-step_S / 60) + np.abs(rng.normal(0, 0.06, n))
        stages = np.abs(rng.normal(0, 0.7, (3, n)))
        score = rng.normal(0, 0.9, n)
        for spike in self.spikes:
            loss += 1.5 * spike.pulse(step_S)
            norm += 7 * spike.pulse(step_S)
            score += 14 * spike.pulse(step_S)
            stages += np.stack([(16, 11, 13)[i] * spike.pulse(step_S, i + 1) for i in range(3)])
        if self.residual == "hc":
            stages[2] += 9 * (step_S / self.steps) ** 2
            loss += 0.15 * (step_S / self.steps) ** 3
        modes = [self.mode(int(s)) for s in step_S]
        return {
            "step": step_S,
            "routing_mode": modes,
            "loss": loss,
            "grad_norm": norm,
            "lr": 3e-3 * np.minimum(1, (step_S + 1) / 50),
            "tokens": np.full(n, 2048.0),
            "step_seconds": 0.21 + np.abs(rng.normal(0, 0.01, n)),
            "record_seconds": 0.008 + np.abs(rng.normal(0, 0.0005, n)),
            "routing_lag": np.array([self.delay if m == "on" else 0 for m in modes], float),
            "spike_score": score,
            "stage1_score": stages[0],
            "stage2_score": stages[1],
            "stage3_score": stages[2],
        }

    def layers_columns(self, step_S: np.ndarray) -> dict:
        rng = self.rng("layers", int(step_S[0]))
        n, rows = len(step_S), 2 * self.layers
        layer_R, ffn_R = np.repeat(np.arange(self.layers), 2), np.tile([False, True], self.layers)
        depth_R, step_1 = np.arange(rows)[None], step_S[:, None]
        amplify = self._near(step_S, layer_R, stage=3, below=True)
        hot = self._near(step_S, layer_R, stage=1) * ffn_R
        stale = self._near(step_S, layer_R, stage=2, reach=2) * ffn_R

        def noise(scale: float) -> np.ndarray:
            return rng.normal(0, scale, (n, rows))

        out: dict = {"step": np.repeat(step_S, rows), "layer": np.tile(layer_R, n)}
        out["site"] = [SITES[int(f)] for f in ffn_R] * n
        put: dict[str, np.ndarray | np.ma.MaskedArray] = {}
        if self.residual == "hc":
            growth = 0.25 * (step_1 / self.steps) ** 1.6 * (0.6 + 0.8 * np.sin(depth_R / 3) ** 2)
            fwd, bwd = 1 + growth + np.abs(noise(0.004)), 1 + 0.9 * growth + np.abs(noise(0.004))
            low = 1 - 0.6 * growth - np.abs(noise(0.004))
        elif self.residual == "mhc":
            fwd, bwd = 1 + np.abs(noise(1e-4)), 1 + 0.006 + np.abs(noise(0.002)) + 0.02 * amplify
            low = 1 - 0.006 - np.abs(noise(0.002))
        if self.residual != "plain":
            composite_fwd = np.cumprod(fwd, 1)
            composite_bwd = np.cumprod(bwd[:, ::-1], 1)[:, ::-1]
            put |= {
                "amax_gain_fwd": fwd,
                "amax_gain_bwd": bwd,
                "gain_fwd_min": low,
                "gain_bwd_min": low,
            }
            put |= {"amax_gain_fwd_max": fwd * 1.04, "amax_gain_bwd_max": bwd * 1.07}
            put |= {"composite_gain_fwd": composite_fwd, "composite_gain_bwd": composite_bwd}
            put |= {
                "composite_gain_fwd_max": composite_fwd * 1.1,
                "composite_gain_bwd_max": composite_bwd * 1.15,
            }
            put |= {
                "composite_gain_fwd_min": np.cumprod(low, 1),
                "composite_gain_bwd_min": np.cumprod(low, 1)[:, ::-1],
            }
            put |= {
                "amax_gain_fwd_of_mean": 1 + (fwd - 1) * 0.6,
                "amax_gain_bwd_of_mean": 1 + (bwd - 1) * 0.6,
            }
            put |= {
                "composite_gain_fwd_of_mean": composite_fwd**0.6,
                "composite_gain_bwd_of_mean": composite_bwd**0.6,
            }
            put |= {
                "early_signal_share": np.cumprod(low, 1),
                "spectral_norm_res": np.maximum(fwd, bwd),
            }
            put |= {
                "spectral_norm_res_max": 1.03 * np.maximum(fwd, bwd),
                "post_concentration": 1.3 + np.abs(noise(0.1)),
            }
        if self.residual == "mhc":
            put["sinkhorn_residual"] = 0.006 + np.abs(noise(0.002)) + 0.05 * amplify
        rms = 0.8 + 0.12 * depth_R + 0.02 * noise(1) + 1.4 * amplify
        put |= {"branch_share": 0.3 + 0.2 / (1 + depth_R) + noise(0.01), "stream_rms": rms}
        put |= {"stream_amax": rms * (9 + np.abs(noise(0.4)) + 30 * amplify)}
        put |= {
            "transport_gain_fwd": 1.02 + noise(0.006) + 0.5 * amplify,
            "transport_gain_fwd_max": 1.2 + 2 * amplify,
        }
        put |= {
            "transport_gain_bwd": 1.01 + noise(0.008) + 0.3 * amplify,
            "grad_norm": 0.2 + np.abs(noise(0.02)) + amplify,
        }
        moe = np.broadcast_to(ffn_R, (n, rows))
        for name, base, lift in (
            ("clamp_gate_rate", 2e-4, 0.04),
            ("clamp_up_high_rate", 1e-4, 0.015),
            ("clamp_up_low_rate", 1e-4, 0.012),
        ):
            put[name] = _only(moe, base * np.exp(noise(0.4)) + lift * hot)
        put["gate_amax"] = _only(moe, 4.6 + np.abs(noise(0.3)) + 34 * hot)
        put["up_amax"] = _only(moe, 4.1 + np.abs(noise(0.3)) + 20 * hot)
        put["act_amax"] = _only(moe, 14 + np.abs(noise(1)) + 180 * hot)
        put["expert_norm_max_median"] = _only(moe, 1.4 + np.abs(noise(0.05)) + 9 * hot)
        put["expert_norm_min_median"] = _only(moe, 0.7 - np.abs(noise(0.03)))
        routed = moe & (layer_R > 0)
        probe = routed & (step_1 % self.probe_every == 0)
        flips = (
            0.02 + 0.05 * np.exp(-step_1 / (0.2 * self.steps)) + np.abs(noise(0.006)) + 0.28 * stale
        )
        put |= {
            "flip_rate": _only(probe, flips),
            "flip_top1": _only(probe, flips * 0.7),
            "flip_any": _only(probe, flips * 1.8),
        }
        put["flip_rate_router"] = _only(routed, 0.15 * flips)
        on = np.array([self.mode(int(s)) == "on" for s in step_S])[:, None]
        put["flip_rate_anticipatory"] = _only(routed & on, flips * 1.1)
        margin = 0.05 + 0.01 * noise(0.2) - 0.03 * stale
        put |= {
            "router_margin_p01": _only(routed, margin * 0.05),
            "router_margin_p10": _only(routed, margin * 0.3),
        }
        put |= {
            "router_margin_mean": _only(routed, margin),
            "router_entropy": _only(routed, 1.95 + noise(0.01) - 0.5 * stale),
        }
        put |= {
            "max_vio": _only(moe, 0.25 + np.abs(noise(0.05)) + 1.2 * stale),
            "load_cv": _only(moe, 0.15 + 0.6 * stale),
        }
        weights = moe & (step_1 % 10 == 0)
        put |= {f"spectral_norm_{k}": _only(weights, 2.1 + 3 * hot) for k in ("gate", "up", "down")}
        put["spectral_norm_router"] = _only(routed & (step_1 % 10 == 0), 1.1 + 0.4 * stale)
        return out | {k: v.reshape(-1) for k, v in put.items()}

    def experts_columns(self, step_S: np.ndarray) -> dict:
        rng = self.rng("experts", int(step_S[0]))
        shape = (len(step_S), self.layers, self.experts)
        skew = rng.normal(0, 0.15, shape) + np.random.default_rng(self.seed).normal(
            0, 0.25, (1, *shape[1:])
        )
        rms = 1.0 + np.abs(rng.normal(0, 0.08, shape))
        for spike in self.spikes:
            rms[:, spike.layer, spike.expert] += 8 * spike.pulse(step_S, 1)
            skew[:, spike.layer, spike.expert] += 1.1 * spike.pulse(step_S, 2)
        load = np.exp(skew)
        load /= load.sum(-1, keepdims=True)
        index = np.indices(shape).reshape(3, -1)
        columns = {"load": load, "gate_mass": load, "act_rms": rms, "act_amax": rms * 13}
        columns["clamp_hits"] = np.round(40 * np.clip(rms - 2, 0, None))
        keys = {"step": step_S[index[0]], "layer": index[1], "expert": index[2]}
        return keys | {k: v.reshape(-1) for k, v in columns.items()}

    def matrices_columns(self, step_S: np.ndarray) -> dict | None:
        sampled = step_S[step_S % self.matrices_every == 0]
        if self.residual == "plain" or not len(sampled):
            return None
        rng = self.rng("matrices", int(step_S[0]))
        n = self.streams
        cells = [("pre", 0, j) for j in range(n)] + [("post", 0, j) for j in range(n)]
        cells += [("res", i, j) for i in range(n) for j in range(n)]
        rows = [
            (s, r // 2, SITES[r % 2], *c)
            for s in sampled
            for r in range(2 * self.layers)
            for c in cells
        ]
        step, layer, site, kind, i, j = map(list, zip(*rows, strict=True))
        diagonal = np.array([a == b and k == "res" for k, a, b in zip(kind, i, j, strict=True)])
        grown = 0.6 * np.array(step) / self.steps if self.residual == "hc" else 0
        value = np.where(diagonal, 0.7 + grown, 0.1) + rng.normal(
            0, 0.02 + 0.1 * np.mean(grown), len(rows)
        )
        value = np.where(np.array(kind) == "pre", 0.5 + rng.normal(0, 0.05, len(rows)), value)
        value = np.where(np.array(kind) == "post", 1.0 + rng.normal(0, 0.1, len(rows)), value)
        return {
            "step": step,
            "layer": layer,
            "site": site,
            "map": kind,
            "i": i,
            "j": j,
            "value": value,
        }

    def tokens_columns(self, step_S: np.ndarray) -> dict | None:
        sampled = step_S[step_S % self.probe_every == 0]
        if not self.token_trajectories or not len(sampled):
            return None
        fixed = np.random.default_rng([self.seed, 7])
        rows = 2 * self.layers
        drift_TR2 = np.cumsum(fixed.normal(0.02, 0.1, (self.token_trajectories, rows, 2)), 1)
        home_TR = fixed.integers(0, self.experts, (self.token_trajectories, rows))
        step, token, row = (
            k.reshape(-1)
            for k in np.meshgrid(
                sampled, np.arange(self.token_trajectories), range(rows), indexing="ij"
            )
        )
        layer, ffn = row // 2, row % 2 == 1
        stale = np.zeros(len(step))
        for spike in self.spikes:
            near = (layer >= spike.layer) & (layer <= spike.layer + 2)
            stale += near * spike.pulse(step, 2)
        stale *= ffn & (layer > 0)
        moved = stale > 0.15
        expert = (home_TR[token, row] + 3 * moved) % self.experts
        place = drift_TR2[token, row] * (1 + 0.6 * stale[:, None])
        rng = self.rng("tokens", int(step_S[0]))
        return {
            "step": step,
            "token": token * 17,
            "token_id": 100 + token,
            "layer": layer,
            "site": [SITES[int(f)] for f in ffn],
            "experts": [
                [int(e), int((e + 1) % self.experts)] if f else None
                for e, f in zip(expert, ffn, strict=True)
            ],
            "norm": 1 + 0.1 * row + np.abs(rng.normal(0, 0.01, len(step))),
            "projection_1": place[:, 0] + rng.normal(0, 0.003, len(step)),
            "projection_2": place[:, 1],
            "margin": _only(ffn, 0.05 * (1 - stale)),
            "flipped": _only(ffn, 0.5 * moved),
        }

    def events(self) -> list[Event]:
        out = [Event(step=0, kind="attempt", message="training began", time=1.7e9)]
        for spike in self.spikes:
            where = {"layer": spike.layer, "site": "ffn", "expert": spike.expert}
            message = (
                f"planted expert-scale in layer {spike.layer}, expert {spike.expert}: weights × 6"
            )
            out.append(
                Event(
                    step=spike.onset - spike.leads[0],
                    kind="fault",
                    message=message,
                    time=1.7e9,
                    **where,
                )
            )
            data = {
                "kind": "spike",
                "onset": spike.onset,
                "detected": spike.onset + 2,
                "peak": None,
                "end": None,
                "score": 8.4,
            }
            message = f"loss left its trend at step {spike.onset}: 8.4 robust σ"
            out.append(
                Event(
                    step=spike.onset + 2,
                    kind="spike",
                    message=message,
                    data=data,
                    time=1.7e9 + spike.onset,
                )
            )
            data = data | {"peak": spike.peak, "end": spike.end, "score": 14.1}
            warned = spike.onset - 9
            message = f"layer {spike.layer} left its range at step {warned - 2}: stage 1"
            out.append(
                Event(
                    step=warned, kind="early_warning", message=message, time=1.7e9 + warned, **where
                )
            )
            message = f"spike of step {spike.onset} is over; it peaked at step {spike.peak}"
            out.append(
                Event(
                    step=spike.end,
                    kind="recovered",
                    message=message,
                    data=data,
                    time=1.7e9 + spike.end,
                )
            )
        for a, b in self.routing_on:
            why = f"spike at step {a - 2}: anticipatory routing for {b - a} steps, Δ = {self.delay}"
            out.append(Event(step=a, kind="decision", message=why, time=1.7e9 + a))
            for at, text in (
                (a, "off → warmup"),
                (a + self.delay, "warmup → on"),
                (b - self.delay, "on → drain"),
                (b, "drain → off"),
            ):
                out.append(Event(step=at, kind="routing", message=f"{text}", time=1.7e9 + at))
        return sorted(out, key=lambda e: e.step)

    def _near(self, step_S, layer_R, stage: int, reach: int = 0, below: bool = False) -> np.ndarray:
        """Return the effect of the spikes at each step and site.

        A spike acts on its own layer, on the next `reach` layers, or on all layers below.
        """
        effect = np.zeros((len(step_S), len(layer_R)))
        for spike in self.spikes:
            distance = layer_R - spike.layer
            share = np.where(
                (distance >= 0) & ((distance <= reach) | below),
                0.75**distance if not below else 1,
                0,
            )
            effect += spike.pulse(step_S, stage)[:, None] * share[None]
        return effect


def _only(where: np.ndarray, values: np.ndarray) -> np.ma.MaskedArray:
    """`values` where they apply; null elsewhere."""
    return np.ma.MaskedArray(np.broadcast_to(values, where.shape), mask=~where)
