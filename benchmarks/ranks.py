"""Training on several ranks: what recording costs, whether all see and do the same, and what a killed rank leaves.

    geodiag bench ranks --ranks 2

NCCL where there is a GPU for each rank; gloo on the CPU, or with `--device cuda:0` on one GPU that they share.
Results: benchmarks/results/ranks.json and ranks.md.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geodiag.benchmarks.report import Parser, save, say, setting, where
from geodiag.run import open_run

if TYPE_CHECKING:
    from geodiag.cli.loop import Training

PARALLEL = ("ddp", "fsdp")
FAULT_STEP = 90
STEERED = ("--routing", "auto", "--rollback", "memory", "--snapshot-every", "20", "--delay", "4", "--period", "15")


# -- the ranks' own part: times of a step --------------------------------------------------------


def cost(out: Path, device: str, size: str, sequences: int, steps: int) -> None:
    """Called on every rank: median times of a step with and without geodiag; rank 0 writes them down."""
    import torch
    import torch.distributed as dist

    from geodiag.cli.loop import Training
    from geodiag.cli.options import Options

    found: dict[str, Any] = {}
    for parallel in PARALLEL:
        run = out / parallel
        options = Options(size=size, device=device, sequences=sequences, parallel=parallel, run=run, steps=10_000)
        training = Training(options, quiet=True)
        for number in range(4):
            _step(training, number, watched=True)
        watched = [_step(training, n, watched=True) for n in range(steps)]
        training.monitor.close()  # takes the hooks off
        bare = [_step(training, n, watched=False) for n in range(steps)]
        gpu = training.device.type == "cuda"
        found[parallel] = {
            "bare_ms": 1e3 * statistics.median(bare),
            "watched_ms": 1e3 * statistics.median(watched),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
            "backend": dist.get_backend(),
        }
        del training
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if dist.get_rank() == 0:
            (out / "cost.json").write_text(json.dumps(found))


def _step(training: "Training", number: int, watched: bool) -> float:
    """Seconds of one step."""
    (batch,) = training._parts(training.loader.batch(number % 8))
    batch = training._to_device(batch)
    _wait(training)
    began = time.perf_counter()
    training.trainer.accumulate(batch)
    done = training.trainer.update()
    if watched:
        training.monitor.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
    _wait(training)
    return time.perf_counter() - began


def _wait(training: "Training") -> None:
    import torch

    if training.device.type == "cuda":
        torch.cuda.synchronize()


# -- the bench -----------------------------------------------------------------------------------


def torchrun(ranks: int, *module: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "--", *module]


def train(ranks: int, run: Path, *options: str) -> list[str]:
    """The command of a training with `geodiag train`."""
    more = ("train", "--run", str(run), "--sequences", str(4 * ranks), *options)
    return torchrun(ranks, "geodiag.cli", *more) if ranks > 1 else [sys.executable, "-m", "geodiag.cli", *more]


def call(command: list[str], seconds: float) -> dict[str, Any]:
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    return {"code": done.returncode, "seconds": time.perf_counter() - began, "tail": done.stderr[-1500:]}


def same(folder: Path, ranks: int, device: str) -> dict[str, Any]:
    """Largest difference of the losses of one process and of several ranks on the same batches."""
    options = ("--steps", "40", "--device", device)
    one = ["--sequences", str(4 * ranks)]
    call([*train(1, folder / "one", *options), *one], 120)
    loss = open_run(folder / "one").read("steps")["loss"].to_numpy()
    found = {}
    for parallel in PARALLEL:
        ended = call(train(ranks, folder / parallel, *options, "--parallel", parallel), 120)
        rows = open_run(folder / parallel).read("steps", ranks="merged")
        found[parallel] = {
            "code": ended["code"],
            "seconds": ended["seconds"],
            "steps": len(rows),
            "largest_difference": float(abs(rows["loss"].to_numpy() - loss[: len(rows)]).max()),
            "final_loss": float(rows["loss"].iloc[-1]),
        }
    return found | {"one_process": float(loss[-1])}


def steered(folder: Path, ranks: int, device: str, parallel: str) -> dict[str, Any]:
    """A planted fault, answered: did every rank have the same mode at the same step of the same attempt?"""
    fault = ("--inject", f"lr-shock@{FAULT_STEP}=40", "--steps", "160", "--device", device)
    ended = call(train(ranks, folder / f"auto-{parallel}", *STEERED, *fault, "--parallel", parallel), 120)
    run = open_run(folder / f"auto-{parallel}")
    rows = run.read("steps", ["rank", "attempt", "step", "routing_mode", "routing_lag"], attempt="all")
    each = [rows[rows["rank"] == r].drop(columns="rank").to_numpy().tolist() for r in range(ranks)]
    events = run.read("events")
    return {
        "code": ended["code"],
        "alike": all(other == each[0] for other in each[1:]),
        "rows_a_rank": [len(e) for e in each],
        "modes": rows["routing_mode"].value_counts().to_dict(),
        "events": events["kind"].value_counts().to_dict(),
        "said": events[events["kind"].isin(["spike", "decision", "rollback", "problem"])]["message"].tolist()[:8],
    }


def killed(folder: Path, ranks: int, device: str) -> dict[str, Any]:
    """Rank 1 killed with kill -9: are the steps that were done on record, and how soon do the others end?"""
    run = folder / "killed"
    command = train(ranks, run, "--steps", "39", "--device", device, "--routing", "auto")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said, began = 0, 0.0
    for line in process.stderr:
        if match := re.match(r"step (\d+)/", line):
            said = int(match[1])
            if said == 12 and not began:
                os.kill(int((run / "journal" / "rank-1.lock").read_text()), signal.SIGKILL)
                began = time.perf_counter()
    code = process.wait(120)
    opened = open_run(run)
    steps = opened.read("steps", ["rank", "step"])
    have = {rank: steps[steps["rank"] == rank]["step"].tolist() for rank in range(ranks)}
    return {
        "code": code,
        "seconds_to_the_end": time.perf_counter() - began,
        "said": said,
        "on_record": {r: len(s) for r, s in have.items()},
        "complete": all(s[: said - 1] == list(range(said - 1)) for s in have.values()),
        "status": opened.status(),
        "problems": opened.problems,
    }


def run(ranks: int, device: str, size: str, steps: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Everything; a part that fails says so and leaves the others their turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def costs() -> dict[str, Any]:
            worker = (
                "geodiag.benchmarks.ranks",
                "--worker",
                str(folder),
                "--device",
                device,
                "--size",
                size,
                "--steps",
                str(steps),
            )
            ended = call([*torchrun(ranks, *worker)], 150)
            path = folder / "cost.json"
            return json.loads(path.read_text()) if path.exists() else ended

        parts = {
            "cost": costs,
            "same": lambda: same(folder, ranks, device),
            "steered_ddp": lambda: steered(folder, ranks, device, "ddp"),
            "steered_fsdp": lambda: steered(folder, ranks, device, "fsdp"),
            "killed": lambda: killed(folder, ranks, device),
        }
        found: dict[str, Any] = {}
        for part, measure in parts.items():
            if only and part not in only:
                continue
            try:
                found[part] = measure()
            except Exception as e:  # one part's trouble is its result
                found[part] = {"failed": f"{type(e).__name__}: {e}"}
            print(json.dumps({part: found[part]}), file=sys.stderr, flush=True)
    return found


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [
        f"# {result['ranks']} ranks",
        "",
        where(result),
        "",
        "| | step | watched | more | peak memory |",
        "|---|---|---|---|---|",
    ]
    for parallel, c in result.get("cost", {}).items():
        if isinstance(c, dict):
            more = 100 * (c["watched_ms"] / c["bare_ms"] - 1)
            peak = "–" if c["peak_gb"] is None else f"{c['peak_gb']:.1f} GB"
            times = f"{c['bare_ms']:.1f} ms | {c['watched_ms']:.1f} ms | {more:+.1f} %"
            lines.append(f"| {parallel}, {c['backend']} | {times} | {peak} |")
    for parallel in PARALLEL:
        if s := result.get("same", {}).get(parallel):
            lines += [
                "",
                f"{parallel}: losses of {s['steps']} steps within {s['largest_difference']:.1e} of one process.",
            ]
        if s := result.get(f"steered_{parallel}"):
            answer = "the same modes at the same steps" if s.get("alike") else "DIFFERENT modes"
            lines += ["", f"{parallel}, fault at step {FAULT_STEP}: every rank had {answer}; {s.get('events')}."]
    if (k := result.get("killed")) and "said" in k:
        kept = "every completed step of every rank is on record" if k["complete"] else "STEPS ARE MISSING"
        lines += ["", f"Rank 1 killed: the others ended {k['seconds_to_the_end']:.1f} s later; {kept}."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("ranks", __doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="tiny", help="size of the timed model [%(default)s]")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each kind [%(default)s]")
    parser.add_argument("--only", action="append", default=[], help="a part; may be given several times")
    parser.add_argument("--worker", type=Path, default=None, help="used by the bench itself")
    args = parser.parse_args(argv)
    if args.worker is not None:
        cost(args.worker, args.device, args.size, 4 * args.ranks, args.steps)
        return
    result = setting("ranks", argv, "cuda" if args.device != "cpu" and _gpus() else "cpu") | {"ranks": args.ranks}
    result |= run(args.ranks, args.device, args.size, args.steps, args.only)
    save("ranks", result, markdown(result), args.out)
    say(result, markdown(result), args.json)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
