"""Timing of every other kernel against copy bandwidth, and of a site kernel by kernel."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from geodiag.benchmarks.kernels_clock import Clock, Step
from geodiag.benchmarks.kernels_sites import SETS, STREAMS, Site, inputs
from geodiag.reference_models.kernels.autograd.router import route
from geodiag.reference_models.kernels.autograd.sinkhorn import sinkhorn
from geodiag.reference_models.kernels.autograd.swiglu import clamped_swiglu, counted_glu

MOVED = {
    "project_streams": STREAMS,
    "mix": STREAMS + 1,
    "post_forward": 2 * STREAMS + 1,
    "post_project": 2 * STREAMS + 1,
    "post_backward": 2 * STREAMS + 2,
    "inner_to_pre": STREAMS + 1,
    "dx_dphi": 3 * STREAMS + 1,
}
"""What each kernel of a site must move, in units of tokens × channels; the others move next to
nothing.
"""


def _one(clock: Clock, what: str, by: str, steps: list[Step], moved: int) -> dict[str, object]:
    us = clock.median(steps)
    return {"what": what, "by": by, "us": us, "bytes": moved, "of_copy": clock.floor(moved) / us}


def _sinkhorns(
    clock: Clock, by: str, project: Callable[[Tensor], Tensor], *middle: int
) -> Iterator[dict[str, object]]:
    logits = [
        torch.randn(16384, *middle, 4, 4, device="cuda", requires_grad=True) for _ in range(SETS)
    ]
    up = torch.randn_like(logits[0])
    with torch.no_grad():
        steps: list[Step] = [lambda v=v: project(v) for v in logits]  # type: ignore[misc]
        yield _one(clock, "Sinkhorn 16384 × 4 × 4 forward", by, steps, 2 * up.nbytes)
    steps = [lambda v=v: torch.autograd.grad(project(v), v, up) for v in logits]  # type: ignore[misc]
    yield _one(clock, "Sinkhorn 16384 × 4 × 4 forward + backward", by, steps, 5 * up.nbytes)


def operations(clock: Clock, peers: Path | None) -> Iterator[dict[str, object]]:
    yield from _sinkhorns(clock, "geodiag", sinkhorn)
    if peers is not None and (peers / "transformer_engine").is_dir():
        from geodiag.benchmarks.kernels_peers import transformer_engine_sinkhorn

        yield from _sinkhorns(clock, "transformer-engine", transformer_engine_sinkhorn(peers), 1)
    rows_A = 98304
    width = 1280
    experts = 64
    gate_up = [
        torch.randn(rows_A, 2 * width, device="cuda", dtype=torch.bfloat16) * 5 for _ in range(SETS)
    ]
    owner = torch.randint(0, experts, (rows_A,), device="cuda").sort().values
    ends = torch.searchsorted(owner, torch.arange(1, experts + 1, device="cuda"))
    moved = gate_up[0].nbytes * 3 // 2
    name = f"clamped SwiGLU {rows_A} × {width}"
    steps: list[Step] = [lambda v=v: clamped_swiglu(v) for v in gate_up]  # type: ignore[misc]
    yield _one(clock, f"{name} forward", "geodiag", steps, moved)
    on = torch.ones((), dtype=torch.int32, device="cuda")
    steps = [lambda v=v: counted_glu(v, ends, flag=on) for v in gate_up]  # type: ignore[misc]
    yield _one(clock, f"{name} forward, counted", "geodiag", steps, moved)
    grad = torch.randn(rows_A, width, device="cuda", dtype=torch.bfloat16)
    leaves = [v.requires_grad_() for v in gate_up]
    steps = [lambda v=v: torch.autograd.grad(clamped_swiglu(v), v, grad) for v in leaves]  # type: ignore[misc]
    yield _one(
        clock, f"{name} forward + backward", "geodiag", steps, moved + gate_up[0].nbytes * 5 // 2
    )
    scores = [torch.randn(16384, 64, device="cuda") for _ in range(SETS)]
    steps = [lambda v=v: route(v, v[0], 6, 1.5) for v in scores]  # type: ignore[misc]
    yield _one(clock, "router 16384 × 64, top 6", "geodiag", steps, 2 * scores[0].nbytes)


def anatomy(
    clock: Clock, site: Site, tokens: int, channels: int, steps: int = 6
) -> Iterator[dict[str, object]]:
    """Yield each kernel of a site, forward and backward: time, bytes and their copy time."""
    sets = [inputs(tokens, channels, False) for _ in range(SETS)]

    def step(i: int) -> None:
        leaves, ups = sets[i % SETS]
        clock.other.sum()
        torch.autograd.grad(site(*leaves), leaves, ups)

    for i in range(SETS):
        step(i)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for i in range(steps):
            step(i)
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in record.events() or ():
        if event.device_time > 0 and "reduce_kernel" not in event.name:
            ours = event.name.isidentifier()
            times[event.name if ours else "torch: fills"] += event.device_time / steps
    for name, us in times.items():
        moved = MOVED.get(name, 0) * tokens * channels * torch.bfloat16.itemsize
        yield {"kernel": name, "us": us, "bytes": moved, "floor_us": clock.floor(moved)}


def of_operations(rows: list[dict]) -> list[str]:
    lines = ["| operation | by | µs | of copy bandwidth |", "|---|---|---|---|"]
    return lines + [
        f"| {r['what']} | {r['by']} | {r['us']:.1f} | {r['of_copy']:.0%} |" for r in rows
    ]


def of_kernels(title: str, rows: list[dict]) -> list[str]:
    lines = [f"| {title} | µs | MB it must move | µs at copy bandwidth |", "|---|---|---|---|"]
    return lines + [
        f"| `{r['kernel']}` | {r['us']:.1f} | {r['bytes'] / 1e6:.0f} | {r['floor_us']:.0f} |"
        for r in rows
    ]
