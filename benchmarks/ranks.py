"""Benchmark of several ranks: equal losses with geodiag, equal decisions, a killed rank.

    geodiag bench ranks --ranks 2 [--minutes 4]

Uses NCCL if there is a GPU for each rank; otherwise gloo on the CPU, or with `--device cuda:0` on
one GPU that the ranks share. Every part has a time limit. The timed part runs alone, the others in
parallel. Results: benchmarks/results/ranks.json and ranks.md.
"""

import json
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from geodiag.benchmarks.ranks_launch import Started, call, torchrun, train
from geodiag.benchmarks.ranks_page import markdown
from geodiag.benchmarks.report import Parser, save, say, setting
from geodiag.hooks.snapshots.disk_store import folder_of, snapshots_in
from geodiag.run import open_run

PARALLEL = ("ddp", "fsdp")
FAULT_STEP = 90
STEERED = (
    "--routing",
    "auto",
    "--rollback",
    "memory",
    "--snapshot-every",
    "20",
    "--delay",
    "4",
    "--period",
    "15",
)
_DIES_AT = 12


def same(ranks: int, device: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Return the largest difference between the losses of one process and of several ranks."""
    options = ("--steps", "40", "--device", device)
    names = {"one": ((), 1)} | {p: (("--parallel", p), ranks) for p in PARALLEL}
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(
                Started(
                    train(n, folder / name, *options, *more, sequences=4 * ranks),
                    folder / f"{name}.log",
                    seconds,
                )
            )
            for name, (more, n) in names.items()
        }
        ended = {name: s.finish() for name, s in started.items()}
    loss = open_run(folder / "one").read("steps")["loss"].to_numpy()
    found: dict[str, Any] = {}
    for parallel in PARALLEL:
        rows = open_run(folder / parallel).read("steps", ranks="merged")
        apart = abs(rows["loss"].to_numpy() - loss[: len(rows)])
        found[parallel] = ended[parallel] | {
            "steps": len(rows),
            "largest_difference": float(apart.max()),
        }
    return found


def steered(parallel: str, ranks: int, device: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Train with a planted fault; return whether all ranks had the same mode at each step."""
    fault = (
        "--inject",
        f"lr-shock@{FAULT_STEP}=40",
        "--steps",
        "170",
        "--device",
        device,
        "--parallel",
        parallel,
    )
    ended = call(
        train(ranks, folder / "run", *STEERED, *fault, sequences=4 * ranks), folder / "log", seconds
    )
    run = open_run(folder / "run")
    rows = run.read(
        "steps", ["rank", "attempt", "step", "routing_mode", "routing_lag"], attempt="all"
    )
    each = [rows[rows["rank"] == r].drop(columns="rank").to_numpy().tolist() for r in range(ranks)]
    events = run.read("events", attempt="all")
    return ended | {
        "alike": all(other == each[0] for other in each[1:]),
        "rows_a_rank": [len(e) for e in each],
        "modes": rows["routing_mode"].value_counts().to_dict(),
        "events": events["kind"].value_counts().to_dict(),
        "said": events[events["kind"].isin(["spike", "decision", "rollback", "problem"])][
            "message"
        ].tolist()[:8],
    }


def killed(parallel: str, ranks: int, device: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Kill rank 1 with kill -9; return whether all steps are recorded, and when the others end."""
    run = folder / "run"
    options = ("--steps", "39", "--device", device, "--routing", "auto", "--parallel", parallel)
    with Started(
        train(ranks, run, *options, sequences=4 * ranks), folder / "log", seconds
    ) as training:
        while training.running and training.step() < _DIES_AT:
            time.sleep(0.02)
        os.kill(int((run / "journal" / "rank-1.lock").read_text()), signal.SIGKILL)
        dead = time.monotonic()
        ended = training.finish()
    last_printed = training.step()
    opened = open_run(run)
    steps = opened.read("steps", ["rank", "step"])
    have = {rank: steps[steps["rank"] == rank]["step"].tolist() for rank in range(ranks)}
    return ended | {
        "seconds_to_the_end": time.monotonic() - dead,
        "told": last_printed,
        "on_record": {r: len(s) for r, s in have.items()},
        "complete": all(
            s[: last_printed - 1] == list(range(last_printed - 1)) for s in have.values()
        ),
        "status": opened.status(),
        "problems": opened.problems,
    }


def resumed(parallel: str, ranks: int, device: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Remove the newest snapshot of rank 1; return whether all ranks resume from a common one."""
    run = folder / "run"
    ends = time.monotonic() + seconds
    options = (
        "--device",
        device,
        "--parallel",
        parallel,
        "--rollback",
        "disk",
        "--snapshot-every",
        "10",
    )
    first = call(
        train(ranks, run, "--steps", "30", *options, sequences=4 * ranks),
        folder / "first.log",
        seconds,
    )
    kept = [snapshots_in(run, rank) for rank in range(ranks)]
    lost = folder_of(run, 1) / f"step-{kept[1][-1]:08d}"
    lost.rename(folder / "lost")
    again = torchrun(
        ranks, "geodiag.cli", "train", "--resume", str(run), "--steps", "40", "--device", device
    )
    ended = call(again, folder / "again.log", ends - time.monotonic())
    rows = open_run(run).read("steps", ["rank", "attempt", "step"], attempt="all")
    begins = [
        int(rows[(rows["rank"] == r) & (rows["attempt"] == 1)]["step"].min()) for r in range(ranks)
    ]
    return ended | {
        "first": first["code"],
        "kept": kept,
        "lost": kept[1][-1],
        "began_again_at": begins,
    }


def worker(
    ranks: int, device: str, size: str, steps: int, folder: Path, seconds: float
) -> dict[str, Any]:
    """Return what the ranks measure themselves, all in one start."""
    asked = (
        "--worker",
        str(folder),
        "--device",
        device,
        "--size",
        size,
        "--steps",
        str(steps),
        "--ranks",
        str(ranks),
    )
    ended = call(torchrun(ranks, "geodiag.benchmarks.ranks", *asked), folder / "log", seconds)
    written = folder / "worker.json"
    return ended | (json.loads(written.read_text()) if written.exists() else {})


Part = Callable[[Path, float], dict[str, Any]]


def parts(ranks: int, device: str) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for parallel in PARALLEL:
        for part in (steered, killed, resumed):
            found[f"{part.__name__}_{parallel}"] = partial(part, parallel, ranks, device)
    return found | {"same": partial(same, ranks, device)}


def run(args: Namespace) -> dict[str, Any]:
    """Run all parts; a part that fails reports its error and the others go on."""
    ends = time.monotonic() + 60 * args.minutes
    found = dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:

        def one(part: str, measure: Part) -> None:
            folder = Path(name) / part
            folder.mkdir()
            left = min(args.seconds, ends - time.monotonic())
            try:
                found[part] = measure(folder, left) if left > 0 else {"failed": "no time was left"}
            except Exception as e:  # one part's trouble is its result
                logs = "".join(
                    p.read_text(errors="replace")[-800:] for p in sorted(folder.glob("*log"))
                )
                found[part] = {"failed": f"{type(e).__name__}: {e}", "tail": logs}
            print(json.dumps({part: found[part]}), file=sys.stderr, flush=True)

        timed: dict[str, Part] = {
            "worker": partial(worker, args.ranks, args.device, args.size, args.steps)
        }
        for each, at_once in ((timed, 1), (parts(args.ranks, args.device), args.together)):
            with ThreadPoolExecutor(at_once) as pool:
                for part, measure in each.items():
                    if not args.only or any(part.startswith(word) for word in args.only):
                        pool.submit(one, part, measure)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("ranks", __doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="tiny", help="size of the timed model [%(default)s]")
    parser.add_argument(
        "--steps", type=int, default=30, help="timed steps of each kind [%(default)s]"
    )
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="after which everything ends [%(default)s]"
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="after which a part hangs [%(default)s]"
    )
    parser.add_argument("--together", type=int, default=4, help="parts side by side [%(default)s]")
    parser.add_argument(
        "--only", action="append", default=[], help="a part; may be given several times"
    )
    parser.add_argument("--worker", type=Path, default=None, help="used by the bench itself")
    args = parser.parse_args(argv)
    if args.worker is not None:
        from geodiag.benchmarks.ranks_worker import measure

        measure(args.worker, args.device, args.size, 4 * args.ranks, args.steps)
        return
    result = setting("ranks", argv, "cuda" if args.device != "cpu" and _gpus() else "cpu") | {
        "ranks": args.ranks
    }
    result |= run(args)
    save("ranks", result, markdown(result), args.out)
    say(result, markdown(result), args.json)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
