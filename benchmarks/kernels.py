"""Times every kernel, and the whole mHC site, against the bytes it must move: `python benchmarks/kernels.py --help`.

Every figure is the median of replays of a CUDA graph (so nothing of Python is in it), inputs rotated, the L2 cache
filled with something else before each. The floor is the fewest bytes over this device's own copy bandwidth.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from geodiag.errors import GeodiagError
from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.mhc_after import mhc_after_linked
from geodiag.reference_models.kernels.mhc_before import mhc_before_linked
from geodiag.reference_models.kernels.router import route
from geodiag.reference_models.kernels.sinkhorn import sinkhorn
from geodiag.reference_models.kernels.swiglu import clamped_swiglu, counted_glu

STREAMS = 4
SETS = 2

Step = Callable[[], object]


class Clock:
    """Medians of device time, by graph replays between events."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.other = torch.ones(1 << 26, device="cuda")
        self.copy = self._copy_bandwidth()

    def _copy_bandwidth(self) -> float:
        """Bytes read and written a second by a device-to-device copy of random numbers."""
        source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        # Not in a graph: there a copy is a memory-copy node, which other hardware serves at half the speed.
        seconds = self.median([lambda: target.copy_(source)], graph=False) * 1e-6
        return 2 * source.nbytes / seconds

    def median(self, steps: list[Step], graph: bool = True) -> float:
        """Microseconds of one step; the steps are the same work on different inputs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in steps * 3:
                step()
        torch.cuda.current_stream().wait_stream(stream)
        runs: list[Step] = list(steps)
        if graph:
            runs = []
            for step in steps:
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):
                    step()
                runs.append(captured.replay)
        times = []
        for i in range(self.repeats):
            self.other.sum()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            runs[i % len(runs)]()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) * 1e3)
        return statistics.median(times)


def peak_extra(step: Step) -> float:
    """MB allocated beyond what was there before, at the step's worst moment, its results included."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def site_inputs(tokens: int, channels: int, innermost: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves x, phi, alpha, bias, f and upstream gradients of the block's input and of the new streams."""
    n, k = STREAMS, STREAMS * STREAMS + 2 * STREAMS
    like = {"device": "cuda", "dtype": torch.bfloat16}
    shape = (tokens, 1, channels, n) if innermost else (tokens, n, channels)
    flat = (tokens, 1, channels) if innermost else (tokens, channels)
    phi = torch.randn(n * channels, k, device="cuda") / (n * channels) ** 0.5
    leaves = [
        torch.randn(shape, **like),
        phi.T.contiguous() if innermost else phi,
        torch.ones(3, device="cuda"),
        torch.randn((1, k) if innermost else (k,), device="cuda"),
        torch.randn(flat, **like),
    ]
    return [v.requires_grad_() for v in leaves], [torch.randn(flat, **like), torch.randn(shape, **like)]


def triton_site(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    mix, link, _ = mhc_before_linked(x, phi, alpha, bias)
    assert mix.post_TN is not None
    assert mix.res_TNN is not None
    return mix.inner_TC, mhc_after_linked(x, f, mix.post_TN, mix.res_TNN, link)[0]


def measured_site(flag: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    def site(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        mix, link, _ = mhc_before_linked(x, phi, alpha, bias, flag=flag)
        assert mix.post_TN is not None
        assert mix.res_TNN is not None
        return mix.inner_TC, mhc_after_linked(x, f, mix.post_TN, mix.res_TNN, link, flag)[0]

    return site


def reference_site(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    mix = reference.mhc_before(x, phi, alpha, bias)
    assert mix.post_TN is not None
    assert mix.res_TNN is not None
    return mix.inner_TC, reference.mhc_after(x, f, mix.post_TN, mix.res_TNN)


def time_site(clock: Clock, site: Callable, tokens: int, channels: int, innermost: bool = False) -> dict[str, float]:
    sets = [site_inputs(tokens, channels, innermost) for _ in range(SETS)]

    def both(leaves: list[Tensor], ups: list[Tensor]) -> object:
        return torch.autograd.grad(site(*leaves), leaves, ups)

    with torch.no_grad():
        forward = clock.median([lambda s=s: site(*s[0]) for s in sets])
    peak = peak_extra(lambda: both(*sets[0]))
    return {"forward_us": forward, "both_us": clock.median([lambda s=s: both(*s) for s in sets]), "peak_mb": peak}


def floors(clock: Clock, tokens: int, channels: int) -> tuple[float, float]:
    """Microseconds: x twice, f, y, x' forward; x, f, dy, dx', dx, df more backward; bfloat16."""
    unit = tokens * channels * 2 / clock.copy * 1e6
    forward = (3 * STREAMS + 2) * unit
    return forward, forward + (3 * STREAMS + 3) * unit


def sites(clock: Clock, sizes: list[tuple[int, int]], peers: Path | None, others: bool) -> list[dict]:
    rows = []
    for tokens, channels in sizes:
        floor, floor_both = floors(clock, tokens, channels)
        on = torch.ones((), dtype=torch.int32, device="cuda")
        runs: dict[str, tuple[Callable, bool]] = {"geodiag": (triton_site, False)}
        if (tokens, channels) == sizes[0]:
            runs["geodiag, diagnostics off"] = (measured_site(torch.zeros_like(on)), False)
            runs["geodiag, diagnostics on"] = (measured_site(on), False)
        if peers is not None:
            from geodiag.benchmarks.kernels_peers import transformer_engine

            runs["transformer-engine"] = (transformer_engine(peers), True)
        if others:
            runs["torch.compile"] = (torch.compile(reference_site), False)
            runs["eager"] = (reference_site, False)
        for name, (site, innermost) in runs.items():
            row = {"what": "mHC site", "by": name, "tokens": tokens, "channels": channels}
            row |= time_site(clock, site, tokens, channels, innermost)
            row |= {"floor_us": floor, "floor_both_us": floor_both}
            rows.append(row)
            print(
                f"{name:26s} T {tokens} C {channels}: {row['forward_us']:7.0f} ({row['forward_us'] / floor:.2f}x) / "
                f"{row['both_us']:7.0f} ({row['both_us'] / floor_both:.2f}x) us, {row['peak_mb']:6.0f} MB",
                flush=True,
            )
            torch.cuda.empty_cache()
    return rows


def operations(clock: Clock) -> list[dict]:
    """Every other kernel, with its share of the copy bandwidth where bytes are what it costs."""
    rows = []

    def add(what: str, steps: list[Step], moved: int) -> None:
        us = clock.median(steps)
        rows.append({"what": what, "us": us, "bytes": moved, "of_copy": moved / (us * 1e-6) / clock.copy})
        print(f"{what:44s} {us:8.1f} us  {rows[-1]['of_copy']:.0%} of copy", flush=True)

    logits = [torch.randn(16384, 4, 4, device="cuda", requires_grad=True) for _ in range(SETS)]
    up = torch.randn(16384, 4, 4, device="cuda")
    add("sinkhorn 16384 x 4 x 4 forward", [lambda v=v: sinkhorn(v.detach()) for v in logits], 2 * up.nbytes)
    add(
        "sinkhorn 16384 x 4 x 4 forward+backward",
        [lambda v=v: torch.autograd.grad(sinkhorn(v), v, up) for v in logits],
        5 * up.nbytes,
    )
    rows_A, width = 98304, 1280
    gate_up = [torch.randn(rows_A, 2 * width, device="cuda", dtype=torch.bfloat16) * 5 for _ in range(SETS)]
    expert = torch.randint(0, 64, (rows_A,), device="cuda").sort().values
    moved = gate_up[0].nbytes * 3 // 2
    add("clamped SwiGLU 98304 x 1280 forward", [lambda v=v: clamped_swiglu(v) for v in gate_up], moved)
    ends = torch.searchsorted(expert, torch.arange(1, 65, device="cuda"))
    add("clamped SwiGLU with counters", [lambda v=v: counted_glu(v, ends) for v in gate_up], moved)
    leaves = [v.requires_grad_() for v in gate_up]
    grad = torch.randn(rows_A, width, device="cuda", dtype=torch.bfloat16)
    add(
        "clamped SwiGLU forward+backward",
        [lambda v=v: torch.autograd.grad(clamped_swiglu(v), v, grad) for v in leaves],
        moved + gate_up[0].nbytes * 5 // 2,
    )
    scores = [torch.randn(16384, 64, device="cuda") for _ in range(SETS)]
    add("router 16384 x 64, top 6", [lambda v=v: route(v, v[0], 6, 1.5) for v in scores], 2 * scores[0].nbytes)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--peers", type=Path, help="folder of an unpacked transformer-engine wheel to compare with")
    parser.add_argument("--others", action="store_true", help="also torch.compile and eager (minutes, much memory)")
    parser.add_argument(
        "--sizes", default="16384x2560,16384x4096,32768x2560", help="tokens x channels, comma-separated"
    )
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise GeodiagError("the kernels are measured on a GPU, and torch sees none here; run this where there is one")
    clock = Clock(options.repeats)
    print(f"{torch.cuda.get_device_name()}, copy {clock.copy / 1e12:.2f} TB/s", flush=True)
    sizes = [(int(t), int(c)) for t, c in (s.split("x") for s in options.sizes.split(","))]
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
        "copy_bytes_per_second": clock.copy,
    }
    # Written after each part: a peer's compilation can outlast the time there is.
    for part, measure in (
        ("operations", lambda: operations(clock)),
        ("sites", lambda: sites(clock, sizes, options.peers, options.others)),
    ):
        result[part] = measure()
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
