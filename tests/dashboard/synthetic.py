"""Realistic runs without training, written with Run.create and Run.append.

`python tests/dashboard/synthetic.py FOLDER [--long]` writes the runs for the development
of the pages.
"""

import sys
from pathlib import Path

import numpy as np

from geodiag.run import Run
from tests.dashboard.run_script import RunScript, ScriptedSpike


def write_rows(run: Run, script: RunScript, first: int, last: int, chunk: int = 200) -> None:
    """Append the rows of steps first ≤ step < last."""
    for a in range(first, last, chunk):
        step_S = np.arange(a, min(a + chunk, last))
        run.append("steps", script.steps_columns(step_S))
        run.append("layers", script.layers_columns(step_S))
        run.append("experts", script.experts_columns(step_S))
        for table, columns in (
            ("matrices", script.matrices_columns),
            ("tokens", script.tokens_columns),
        ):
            rows = columns(step_S)
            if rows:
                run.append(table, rows)


def create(folder: Path, script: RunScript) -> Run:
    """Create an open run with the manifest of the script, without rows."""
    sites = [f"{layer}.{s}" for layer in range(script.layers) for s in ("attn", "ffn")]
    found = {
        "sites": sites if script.residual != "plain" else [],
        "routers": list(range(1, script.layers)),
        "experts": script.experts,
    }
    config = {
        "residual": script.residual,
        "size": "tiny" if script.layers == 6 else "small",
        "seed": script.seed,
    }
    return Run.create(folder, found=found, config=config | {"routing": "auto"})


def write(folder: Path, script: RunScript, close: bool = True) -> Run:
    """Write the whole script as a run directory."""
    run = create(folder, script)
    write_rows(run, script, 0, script.steps)
    for event in script.events():
        run.event(event)
    run.heartbeat(script.steps - 1)
    if close:
        run.close()
    return run


MHC = RunScript(spikes=(ScriptedSpike(onset=360, layer=3, expert=5),), routing_on=((363, 460),))
HC = RunScript(residual="hc", steps=500, seed=1)
PLAIN = RunScript(residual="plain", steps=300, seed=2, layers=6)
LONG = RunScript(
    layers=32,
    experts=16,
    steps=20_000,
    seed=3,
    matrices_every=1000,
    spikes=tuple(
        ScriptedSpike(onset=at, layer=layer, expert=layer % 16, decay=decay)
        for at, layer, decay in ((4200, 9, 60), (9731, 17, 20), (15120, 5, 150))
    ),
    routing_on=((9735, 9900), (15124, 15600)),
)

if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name, script in {"mhc-tear": MHC, "hc-growing": HC, "plain": PLAIN}.items():
        write(root / name, script)
    if "--long" in sys.argv:
        write(root / "long-32", LONG)
