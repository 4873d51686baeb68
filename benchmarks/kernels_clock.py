"""Device time and device memory of a step, for `geodiag bench kernels`."""

import statistics
from collections.abc import Callable, Sequence

import torch

Step = Callable[[], object]
"""Work to time; what it returns stays alive until it is over."""


class Clock:
    """Median device time: replays of a CUDA graph between events, after overwriting the L2 cache.

    Floors are bytes divided by this device's own copy bandwidth, which is measured first.
    """

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.other = torch.ones(1 << 26, device="cuda")
        source = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        # Not in a graph: there a copy is a memory-copy node, which other hardware serves at half
        # the speed.
        self.copy = 2 * source.nbytes / (self._median([lambda: target.copy_(source)]) * 1e-6)
        """Bytes read and written a second by a device-to-device copy of random numbers."""

    def floor(self, moved: int) -> float:
        """Return the microseconds that moving these bytes takes at copy bandwidth."""
        return moved / self.copy * 1e6

    def median(self, steps: Sequence[Step]) -> float:
        """Return the microseconds of one step; the steps are the same work on different inputs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in [*steps] * 3:
                step()
        torch.cuda.current_stream().wait_stream(stream)
        replays: list[Step] = []
        for step in steps:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                step()
            replays.append(captured.replay)
        return self._median(replays)

    def _median(self, runs: Sequence[Step]) -> float:
        times = []
        for i in range(self.repeats):
            self.other.sum()
            start = torch.cuda.Event(enable_timing=True)
            stop = torch.cuda.Event(enable_timing=True)
            start.record()
            runs[i % len(runs)]()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) * 1e3)
        return statistics.median(times[len(runs) :])


def peaks(step: Step) -> dict[str, float]:
    """Return the peak memory of the step in MB: with its results, and in excess of them."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    after = torch.cuda.memory_allocated()
    del results
    return {"peak_mb": (peak - before) / 1e6, "excess_mb": (peak - after) / 1e6}
