"""Real trainings, killed with kill -9 at random moments: every step that was said to be done is on
record.

    python tests/geodiag/store/kills.py --kills 50 [--seed 0]

trains `tiny` with `geodiag train` in a process of its own, kills it, compares what it had printed
with what the run holds, and again. It prints a line a kill and ends with exit code 1 if a single
completed step is missing, incomplete or doubled. Fifty take about five minutes. The test suite does
five.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geodiag.run import open_run

STEPS = 39
"""The longest training of which `geodiag train` prints every step."""
PLACES = 12
"""Residual sites of `tiny`: rows of `layers` a step."""
_SAID = re.compile(r"^step (\d+)/", re.MULTILINE)


@dataclass(frozen=True)
class Kill:
    """Output of one killed training, and what is wrong with its record; None if nothing is."""

    said: int
    recorded: int
    wrong: str | None


def start(run: Path, data: Path, *more: str, **how: Any) -> subprocess.Popen[str]:
    """A training of `tiny` that prints every step it is through with."""
    main = "from geodiag.cli.main import main; main()"
    options = [
        "--steps",
        str(STEPS),
        "--sequences",
        "1",
        "--data",
        str(data),
        "--run",
        str(run),
        *more,
    ]
    command = [sys.executable, "-c", main, "train", *options]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **how
    )


def wait_for(process: subprocess.Popen[str], steps: int) -> str:
    """Reads until `steps` steps are said to be done (0: until the run is there); what was said."""
    assert process.stderr is not None
    heard = ""
    for line in process.stderr:
        heard += line
        if line.startswith(f"step {steps}/" if steps else "geodiag watches"):
            break
    return heard


def kill_one(folder: Path, data: Path, rng: random.Random) -> Kill:
    """Trains in `folder`, kills at a random moment, and compares."""
    process = start(folder, data)
    heard = wait_for(process, rng.randrange(STEPS - 8))
    time.sleep(rng.uniform(0, 0.3))
    process.kill()
    assert process.stderr is not None
    heard += process.stderr.read()
    process.stderr.close()
    process.wait()
    return judge(folder, max((int(n) for n in _SAID.findall(heard)), default=0))


def judge(folder: Path, said: int) -> Kill:
    """Whether the run in `folder` holds the `said` first steps, each whole and once, and at most
    one more.
    """
    run = open_run(folder)
    steps = run.read("steps", ["step", "loss"])
    have = steps["step"].tolist()
    rows = run.read("layers", ["step"])["step"].value_counts()
    wrong = None
    if have != list(range(len(have))):
        wrong = f"steps {have} are not every one once"
    elif len(have) not in (said, said + 1):
        wrong = f"{len(have)} steps are on record, and {said} were done"
    elif steps["loss"].isna().any():
        wrong = "a step has no loss"
    elif any(rows.get(step, 0) != PLACES for step in have):
        wrong = f"rows of layers a step: {[int(rows.get(step, 0)) for step in have]}, not {PLACES}"
    elif run.problems:
        wrong = f"not read: {run.problems}"
    return Kill(said, len(have), wrong)


def text(folder: Path) -> Path:
    """A little text to train on, so that a training starts quickly."""
    path = folder / "text.txt"
    path.write_text(
        "".join(f"{i} bottles of beer on the wall, {i * i} bottles of beer.\n" for i in range(500))
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill real trainings and look for lost steps.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, lost, recorded = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        data = text(Path(folder))
        for i in range(options.kills):
            kill = kill_one(Path(folder) / f"run-{i}", data, rng)
            lost += kill.wrong is not None
            recorded += kill.recorded
            print(
                f"kill {i + 1}: {kill.said} done, {kill.recorded} on record  {kill.wrong or ''}",
                flush=True,
            )
    print(f"{options.kills} kills, {recorded} steps on record, {lost} runs with a step missing")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
