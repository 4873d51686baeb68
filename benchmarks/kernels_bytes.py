"""Benchmark of memory traffic: bytes that each kernel of an mHC site moves, by GPU counters.

    geodiag bench kernels_bytes [--size 16384x2560]

Runs one site, and one in a chain of sites, forward and backward, under Nsight Compute (`ncu`),
whose counters measure the traffic of device memory and of the L2 cache. The cache is not flushed
between kernels: a kernel finds there what the previous one left, as in a training. Kernels run one
at a time, so that times are a little longer than in a graph.
"""

import csv
import io
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from geodiag.benchmarks.kernels import token_and_channel_counts
from geodiag.benchmarks.report import Parser, present, save, say, setting, where
from geodiag.errors import GeodiagError

SITES = ("alone", "in a chain")
COUNTERS = {
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "lts__t_bytes.sum": "through_l2",
    "gpu__time_duration.sum": "ns",
}
STEPS = 2


def work(name: str, tokens: int, channels: int) -> None:
    """Run the profiled steps of one site, after others that compile its kernels."""
    from geodiag.benchmarks import kernels_sites

    site = kernels_sites.chained_site() if name == "in a chain" else kernels_sites.geodiag_site()
    sets = [
        kernels_sites.inputs(tokens, channels, innermost=False) for _ in range(kernels_sites.SETS)
    ]
    other = torch.ones(1 << 26, device="cuda")
    for i in range(kernels_sites.SETS + STEPS):
        leaves, ups = sets[i % kernels_sites.SETS]
        other.sum()
        torch.cuda.synchronize()
        if i >= kernels_sites.SETS:
            torch.cuda.cudart().cudaProfilerStart()
        torch.autograd.grad(site(*leaves), leaves, ups)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def profile(name: str, tokens: int, channels: int) -> list[dict[str, Any]]:
    """Profile one site; return one row per kernel, in the order of their first launch."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise GeodiagError(
            "ncu is not on the PATH; it comes with CUDA's toolkit, as Nsight Compute"
        )
    asked = [
        ncu,
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--metrics",
        ",".join(COUNTERS),
    ]
    as_it_is = ["--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"]
    itself = [sys.executable, "-m", __spec__.name, "--work", name, "--size", f"{tokens}x{channels}"]
    done = subprocess.run([*asked, *as_it_is, *itself], capture_output=True, text=True, check=False)
    if done.returncode or '"ID"' not in done.stdout:
        raise GeodiagError(
            f"ncu failed, may this user read the counters? Its output: {done.stdout[-600:]}"
        )
    return counted(done.stdout)


def counted(output: str) -> list[dict[str, Any]]:
    """Return the means over the profiled steps from ncu's raw page.

    The page has a line of names, a line of units, and one line per launch.
    """
    table = output[output.index('"ID"') :]
    _units, *launches = csv.DictReader(io.StringIO(table))
    sums: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(COUNTERS.values(), 0.0))
    for launch in launches:
        kernel = launch["Kernel Name"] if launch["Kernel Name"].isidentifier() else "torch: fills"
        for counter, name in COUNTERS.items():
            sums[kernel][name] += float(launch[counter].replace(",", "")) / STEPS
    return [{"kernel": kernel} | row for kernel, row in sums.items()]


def markdown(result: dict[str, Any]) -> str:
    tokens, channels = result["size"]
    lines = [
        "# Bytes that the kernels move",
        "",
        f"{where(result)} One mHC site of {tokens} tokens × {channels} channels × 4 streams in "
        "bfloat16, by the",
        "counters of Nsight Compute, caches as the kernel before left them.",
    ]
    for name, rows in result["sites"].items():
        lines += [
            "",
            f"| kernel of a site {name} | must move, MB | read | written | moved / must | "
            "through L2, MB | µs |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            moved = r["read"] + r["written"]
            over = f"{moved / r['must']:.2f}" if r["must"] else ""
            sizes = " | ".join(f"{r[k] / 1e6:.0f}" for k in ("must", "read", "written"))
            lines.append(
                f"| `{r['kernel']}` | {sizes} | {over} | {r['through_l2'] / 1e6:.0f} | "
                f"{r['ns'] / 1e3:.1f} |"
            )
        read, written, must = (sum(r[k] for r in rows) / 1e6 for k in ("read", "written", "must"))
        whole = f"{must:.0f} | {read:.0f} | {written:.0f} | {(read + written) / must:.2f}"
        lines.append(f"| together | {whole} | | {sum(r['ns'] for r in rows) / 1e3:.0f} |")
    return "\n".join([*lines, "", f"`{result['command']}`"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("kernels_bytes", __doc__)
    parser.add_argument(
        "--size",
        type=token_and_channel_counts,
        default=(16384, 2560),
        metavar="TOKENSxCHANNELS",
        help="of the site",
    )
    parser.add_argument("--work", choices=SITES, help="used by the bench itself")
    options = parser.parse_args(argv)
    present("cuda")
    if options.work:
        work(options.work, *options.size)
        return
    from geodiag.benchmarks.kernels_parts import MOVED

    tokens, channels = options.size
    result = setting("kernels_bytes", argv, "cuda") | {"size": options.size, "sites": {}}
    for name in SITES:
        rows = profile(name, tokens, channels)
        unit = tokens * channels * torch.bfloat16.itemsize
        result["sites"][name] = [r | {"must": MOVED.get(r["kernel"], 0) * unit} for r in rows]
        save("kernels_bytes", result, markdown(result), options.out)
    say(result, markdown(result), options.json)


if __name__ == "__main__":
    main()
