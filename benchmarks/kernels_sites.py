"""Timing of one mHC site by geodiag's and other kernels, against the bytes that it must move."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from geodiag.benchmarks.kernels_clock import Clock, peaks
from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.autograd.mhc_post import mhc_post_linked
from geodiag.reference_models.kernels.autograd.mhc_post_project import mhc_post_project
from geodiag.reference_models.kernels.autograd.mhc_pre import mhc_pre_linked, project

STREAMS = 4
SETS = 2
"""Inputs that take turns."""

Site = Callable[..., tuple[Tensor, Tensor]]
"""(x, phi, alpha, bias, f) → the block's input and the new streams."""


class Contestant(NamedTuple):
    by: str
    site: Site
    innermost: bool = False
    """Whether its streams are innermost: (S, B, C, N)."""


def inputs(tokens: int, channels: int, innermost: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return the leaves x, phi, alpha, bias, f, and upstream gradients of both results."""
    n = STREAMS
    k = STREAMS * STREAMS + 2 * STREAMS

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    shape = (tokens, 1, channels, n) if innermost else (tokens, n, channels)
    flat = (tokens, 1, channels) if innermost else (tokens, channels)
    phi = torch.randn(n * channels, k, device="cuda") / (n * channels) ** 0.5
    leaves = [
        randn(*shape),
        phi.T.contiguous() if innermost else phi,
        torch.ones(3, device="cuda"),
        torch.randn((1, k) if innermost else (k,), device="cuda"),
        randn(*flat),
    ]
    return [v.requires_grad_() for v in leaves], [randn(*flat), randn(*shape)]


def geodiag_site(flag: Tensor | None = None) -> Site:
    def site(
        x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor]:
        mix, link, _ = mhc_pre_linked(x, phi, alpha, bias, flag=flag)
        assert mix.post_TN is not None
        assert mix.res_TNN is not None
        return mix.inner_TC, mhc_post_linked(x, f, mix.post_TN, mix.res_TNN, link, flag)[0]

    return site


def chained_site(flag: Tensor | None = None) -> Site:
    """Return a site in a chain: it gets its projection and computes that of the next site."""
    given: dict[int, Tensor] = {}

    def site(
        x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor]:
        if x.data_ptr() not in given:
            given[x.data_ptr()] = project(x.detach(), phi.detach())
        mix, link, _ = mhc_pre_linked(x, phi, alpha, bias, flag=flag, projected=given[x.data_ptr()])
        assert mix.post_TN is not None
        assert mix.res_TNN is not None
        return mix.inner_TC, mhc_post_project(x, f, mix.post_TN, mix.res_TNN, link, phi, flag)[0]

    return site


def reference_site(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor
) -> tuple[Tensor, Tensor]:
    mix = reference.mhc_pre(x, phi, alpha, bias)
    assert mix.post_TN is not None
    assert mix.res_TNN is not None
    return mix.inner_TC, reference.mhc_post(x, f, mix.post_TN, mix.res_TNN)


def contestants(peers: Path | None) -> Iterator[Contestant]:
    on = torch.ones((), dtype=torch.int32, device="cuda")
    yield Contestant("geodiag", geodiag_site())
    yield Contestant("geodiag, in a chain of sites", chained_site())
    yield Contestant("geodiag, diagnostics off", geodiag_site(torch.zeros_like(on)))
    yield Contestant("geodiag, diagnostics on", geodiag_site(on))
    yield Contestant("geodiag, in a chain, diagnostics on", chained_site(on))
    if peers is not None:
        from geodiag.benchmarks.kernels_peers import liger, transformer_engine

        if (peers / "transformer_engine").is_dir():
            yield Contestant("transformer-engine", transformer_engine(peers), innermost=True)
        if (peers / "liger_kernel").is_dir():
            yield Contestant("liger-kernel", liger(peers))


def floors(clock: Clock, tokens: int, channels: int) -> tuple[float, float]:
    """Return the least time in microseconds of the forward, and of forward and backward.

    Forward: x twice (the block is in between), f, y, x'. Backward: x, f, dy, dx', dx, df in
    addition.
    """
    stream = tokens * channels * torch.bfloat16.itemsize
    return clock.floor((3 * STREAMS + 2) * stream), clock.floor((6 * STREAMS + 5) * stream)


def measure(clock: Clock, contestant: Contestant, tokens: int, channels: int) -> dict[str, object]:
    by, site, innermost = contestant
    sets = [inputs(tokens, channels, innermost) for _ in range(SETS)]

    def both(leaves: list[Tensor], ups: list[Tensor]) -> object:
        new = site(*leaves)
        return new, torch.autograd.grad(new, leaves, ups)

    with torch.no_grad():
        forward = clock.median([lambda s=s: site(*s[0]) for s in sets])  # type: ignore[misc]
    memory = peaks(lambda: both(*sets[0]))
    each = clock.median([lambda s=s: both(*s) for s in sets])  # type: ignore[misc]
    floor, floor_both = floors(clock, tokens, channels)
    row = {"by": by, "tokens": tokens, "channels": channels, "forward_us": forward, "both_us": each}
    return row | {"floor_us": floor, "floor_both_us": floor_both} | memory


def sites(
    clock: Clock, sizes: list[tuple[int, int]], peers: Path | None, others: bool
) -> Iterator[dict[str, object]]:
    """Yield one row per size and contestant: all at the first size, at the others peers last."""
    everyone = list(contestants(peers))
    ours = [c for c in everyone if c.by.startswith("geodiag")]
    theirs = [c for c in everyone if c not in ours]
    if others:
        everyone += [
            Contestant("eager", reference_site),
            Contestant("torch.compile", torch.compile(reference_site)),
        ]
    first, *rest = sizes
    rounds = [
        (first, everyone),
        *((size, ours) for size in rest),
        *((size, theirs) for size in rest),
    ]
    for (tokens, channels), taking_part in rounds:
        for contestant in taking_part:
            yield measure(clock, contestant, tokens, channels)
            torch.cuda.empty_cache()


def markdown(rows: list[dict]) -> list[str]:
    lines = [
        "| tokens × C | by | forward, µs | × floor | both, µs | × floor | peak, MB | in excess "
        "of results, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sizes = list(dict.fromkeys((r["tokens"], r["channels"]) for r in rows))
    for r in sorted(rows, key=lambda r: sizes.index((r["tokens"], r["channels"]))):
        lines.append(
            f"| {r['tokens']} × {r['channels']} | {r['by']} | {r['forward_us']:.0f} | "
            f"{r['forward_us'] / r['floor_us']:.2f} | {r['both_us']:.0f} | "
            f"{r['both_us'] / r['floor_both_us']:.2f} | "
            f"{r['peak_mb']:.0f} | {r['excess_mb']:.0f} |"
        )
    return lines
