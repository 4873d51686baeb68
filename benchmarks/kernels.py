"""Benchmark of the kernels: every operation and the whole mHC site, against floor and peers.

Every figure is the median over replays of a CUDA graph, which contains no Python time. Inputs are
rotated and the L2 cache is overwritten before each replay. The floor is the least number of bytes
divided by this device's own copy bandwidth.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from geodiag.benchmarks.report import Parser, save, say, setting, where

PEERS = ("transformer_engine", "liger_kernel")
SIZES = [(16384, 2560), (16384, 4096), (32768, 2560)]


def run(
    sizes: list[tuple[int, int]],
    peers: Path | None = None,
    others: bool = False,
    out: Path | None = None,
    repeats: int = 40,
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure all rows; write the result to `out` after each, because a peer can take minutes."""
    from geodiag.benchmarks import kernels_parts, kernels_sites
    from geodiag.benchmarks.kernels_clock import Clock

    clock = Clock(repeats)
    result = setting("kernels", argv, "cuda") | {
        "copy_bytes_per_second": clock.copy,
        "operations": [],
        "anatomy": [],
        "anatomy_in_a_chain": [],
        "sites": [],
    }
    parts = {
        "operations": kernels_parts.operations(clock, peers),
        "anatomy": kernels_parts.anatomy(clock, kernels_sites.geodiag_site(), *sizes[0]),
        "anatomy_in_a_chain": kernels_parts.anatomy(clock, kernels_sites.chained_site(), *sizes[0]),
        "sites": kernels_sites.sites(clock, sizes, peers, others),
    }
    for part, rows in parts.items():
        for row in rows:
            result[part].append(row)
            if out is not None:
                save("kernels", result, markdown(result), out)
    return result


def markdown(result: dict[str, Any]) -> str:
    from geodiag.benchmarks import kernels_parts, kernels_sites

    lines = [
        "# Kernels",
        "",
        f"{where(result)} Copy bandwidth {result['copy_bytes_per_second'] / 1e12:.2f} TB/s; "
        "medians of device time.",
        "One mHC site of 4 streams in bfloat16, before and after its block; the floor is the "
        "fewest bytes at that",
        "bandwidth. Memory is that of forward and backward, with the results (the new streams, "
        "the block's input, all",
        "gradients) and in excess of them.",
        "",
        *kernels_sites.markdown(result["sites"]),
        "",
        *kernels_parts.of_operations(result["operations"]),
        "",
        *kernels_parts.of_kernels("kernel of a site", result["anatomy"]),
        "",
        *kernels_parts.of_kernels("kernel of a site in a chain", result["anatomy_in_a_chain"]),
        "",
        f"`{result['command']}`",
    ]
    return "\n".join(lines)


def token_and_channel_counts(text: str) -> tuple[int, int]:
    tokens, _, channels = text.partition("x")
    return int(tokens), int(channels)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("kernels", __doc__)
    parser.add_argument(
        "--peers", type=Path, help="folder of unpacked wheels: transformer-engine, liger-kernel"
    )
    parser.add_argument(
        "--others", action="store_true", help="also torch.compile and eager, at the first size"
    )
    parser.add_argument(
        "--size",
        type=token_and_channel_counts,
        action="append",
        metavar="TOKENSxCHANNELS",
        help="of a site; repeatable",
    )
    parser.add_argument(
        "--repeats", type=int, default=40, help="replays a figure is the median of [%(default)s]"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(
            "this bench measures a GPU, and torch sees none here; run it where there is one"
        )
    if options.peers is not None and not any((options.peers / p).is_dir() for p in PEERS):
        parser.error(
            f"{options.peers} holds no folder {' or '.join(PEERS)}; unpack their wheels there"
        )
    result = run(
        options.size or SIZES, options.peers, options.others, options.out, options.repeats, argv
    )
    say(result, markdown(result), options.json)


if __name__ == "__main__":
    main()
