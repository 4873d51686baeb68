"""Realistic runs without training: written with Run.create and Run.append, as a training would
write them.

`python tests/dashboard/synthetic.py FOLDER [--long]` makes the runs that the page is developed
with.
"""

import sys
from pathlib import Path

import numpy as np

from geodiag.run import Run
from tests.dashboard.story import Story, Tear


def write_rows(run: Run, story: Story, first: int, last: int, chunk: int = 200) -> None:
    """Appends the rows of steps first ≤ step < last."""
    for a in range(first, last, chunk):
        step_S = np.arange(a, min(a + chunk, last))
        run.append("steps", story.steps_columns(step_S))
        run.append("layers", story.layers_columns(step_S))
        run.append("experts", story.experts_columns(step_S))
        for table, columns in (
            ("matrices", story.matrices_columns),
            ("tokens", story.tokens_columns),
        ):
            rows = columns(step_S)
            if rows:
                run.append(table, rows)


def create(folder: Path, story: Story) -> Run:
    """An open run whose manifest tells the story; no rows yet."""
    sites = [f"{layer}.{s}" for layer in range(story.layers) for s in ("attn", "ffn")]
    found = {
        "sites": sites if story.residual != "plain" else [],
        "routers": list(range(1, story.layers)),
        "experts": story.experts,
    }
    config = {
        "residual": story.residual,
        "size": "tiny" if story.layers == 6 else "small",
        "seed": story.seed,
    }
    return Run.create(folder, found=found, config=config | {"routing": "auto"})


def write(folder: Path, story: Story, close: bool = True) -> Run:
    """The whole story as a run directory."""
    run = create(folder, story)
    write_rows(run, story, 0, story.steps)
    for event in story.events():
        run.event(event)
    run.heartbeat(story.steps - 1)
    if close:
        run.close()
    return run


MHC = Story(tears=(Tear(onset=360, layer=3, expert=5),), routing_on=((363, 460),))
HC = Story(residual="hc", steps=500, seed=1)
PLAIN = Story(residual="plain", steps=300, seed=2, layers=6)
LONG = Story(
    layers=32,
    experts=16,
    steps=20_000,
    seed=3,
    matrices_every=1000,
    tears=tuple(
        Tear(onset=at, layer=layer, expert=layer % 16, decay=decay)
        for at, layer, decay in ((4200, 9, 60), (9731, 17, 20), (15120, 5, 150))
    ),
    routing_on=((9735, 9900), (15124, 15600)),
)

if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name, story in {"mhc-tear": MHC, "hc-growing": HC, "plain": PLAIN}.items():
        write(root / name, story)
    if "--long" in sys.argv:
        write(root / "long-32", LONG)
