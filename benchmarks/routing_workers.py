"""Trials of `geodiag bench routing` in parallel, in processes that may die independently."""

import json
import multiprocessing
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from geodiag.benchmarks.report import setting, where
from geodiag.benchmarks.routing_plan import Job
from geodiag.hooks.control.controller import TROUBLE

GRACE = 180.0
"""Seconds that the trials under way, and answers to spikes that were seen, have when the time is
up.
"""


def visible() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


class Schedule:
    """Order of the trials. An arm waits for the training of its seed without intervention.

    If that training raised no spike, the arm would be the same training bit for bit, and is not
    trained again.
    """

    def __init__(self, planned: Iterable[Job], device: str) -> None:
        jobs = list(dict.fromkeys(planned))
        plain = {(s.name, seed) for s, arm, seed in jobs if arm.name == "none"}
        self._first: deque[Job] = deque()
        self._answers: deque[Job] = deque()
        self._waiting: dict[tuple[str, int], list[Job]] = defaultdict(list)
        for job in jobs:
            scenario, arm, seed = job
            repeats = device == "cpu" or scenario.deterministic
            waits = repeats and arm.mode == "auto" and (scenario.name, seed) in plain
            (self._waiting[scenario.name, seed] if waits else self._first).append(job)

    def next(self, late: bool = False) -> Job | None:
        """Return the next job; once it is `late`, only arms of seeds with a spike.

        Otherwise exactly these arms would be missing most often.
        """
        if self._answers:
            return self._answers.popleft()
        return self._first.popleft() if self._first and not late else None

    def ended(self, job: Job, trial: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Return the finished trials: this one, unless it failed, and trials that equal it."""
        scenario, arm, seed = job
        known = [trial] if trial else []
        if arm.name == "none":
            waited = self._waiting.pop((scenario.name, seed), [])
            if trial is None or any(e["kind"] in TROUBLE for e in trial["events"]):
                self._answers.extend(waited)
            else:
                known += [trial | {"arm": asdict(a), "same": True} for _, a, _ in waited]
        return known


def train(job: Job, device: str) -> dict[str, Any]:
    """Return one trial, or the error that ended it."""
    import torch

    from geodiag.benchmarks import routing_trial

    began = time.monotonic()
    torch.set_num_threads(1)
    try:
        found = routing_trial.train(*job, device)
        return found | {
            "seconds": time.monotonic() - began,
            "place": where(setting("routing", [], device)),
        }
    except Exception as e:  # a failed trial is reported, and the others go on
        return {"failed": f"{type(e).__name__}: {e}"}


def serve(pipe: Connection, gpu: str | None) -> None:
    """Train the jobs that come through the pipe, in a process with its own GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    while True:
        try:
            job, device = pipe.recv()
        except EOFError:
            return
        pipe.send(train(job, device))


class Worker:
    """A process that trains one job after another; if it dies, the next job gets a new process."""

    def __init__(self, gpu: str | None) -> None:
        self._gpu = gpu
        self._pipe: Connection | None = None
        self._process: Any = None

    def __call__(self, job: Job, device: str) -> dict[str, Any]:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs, self._gpu), daemon=True)
            self._process.start()
            theirs.close()  # so that the pipe ends when the process dies
        try:
            self._pipe.send((job, device))
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self._pipe = None
            return {"failed": f"its process ended with exit code {code}"}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()


def run(
    planned: Iterable[Job], workers: int, minutes: float, out: Path, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Train until the time is up; append every finished trial to `trials.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(planned, device)
    found = []
    gpus: Sequence[str | None] = visible() if device == "cuda" else [None]
    crew = [Worker(gpus[i % len(gpus)]) for i in range(workers)]
    idle = list(crew)
    under_way = dict[Future, tuple[Worker, Job]]()
    ends = time.monotonic() + 60 * minutes
    with ThreadPoolExecutor(workers) as threads, (out / "trials.jsonl").open("a") as kept:
        while True:
            while idle and (job := schedule.next(late=time.monotonic() >= ends)):
                worker = idle.pop()
                under_way[threads.submit(worker, job, device)] = worker, job
            left = max(ends + GRACE - time.monotonic(), 0.01)
            done, _ = wait(under_way, left, FIRST_COMPLETED) if under_way else (set(), None)
            if not done:
                break
            for future in done:
                worker, job = under_way.pop(future)
                idle.append(worker)
                trial = future.result()
                if "failed" in trial:
                    scenario, arm, seed = job
                    print(
                        f"{scenario.name}, {arm.name}, seed {seed}: {trial['failed']}", flush=True
                    )
                known = schedule.ended(job, None if "failed" in trial else trial)
                found += known
                kept.write("".join(json.dumps(t) + "\n" for t in known))
            kept.flush()
        for worker in crew:
            worker.stop()  # also ends the threads that wait for one
    return found
