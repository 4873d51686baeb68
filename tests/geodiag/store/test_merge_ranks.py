"""Several ranks read as one: each metric by its rule, and ranks that are missing, behind or torn
are a caveat.
"""

import math
from pathlib import Path

import numpy as np
import pytest

from geodiag import open_run
from geodiag.errors import GeodiagError
from geodiag.health import health
from geodiag.run import Run


def two(folder: Path, steps: tuple[int, int] = (3, 3), close: bool = True) -> list[Run]:
    """Two ranks, `steps` of each; what rank 1 sees is 2 more than what rank 0 sees."""
    first = Run.create(folder, world_size=2)
    both = [first, Run.create(folder, rank=1, world_size=2, attempt=first.attempt)]
    for rank, run in enumerate(both):
        for step in range(steps[rank]):
            more = 2.0 * rank
            where = {"step": [step] * 2, "layer": [0, 0], "site": ["attn", "ffn"]}
            run.append(
                "layers",
                where
                | {"composite_gain_fwd": [1 + more, 5.0], "composite_gain_fwd_max": [1 + more] * 2},
            )
            columns = {
                "loss": [4.0 + more],
                "tokens": [100.0],
                "grad_norm": [1 + more],
                "routing_mode": ["on"],
            }
            run.append("steps", {"step": [step]} | columns)
        if close:
            run.close()
    return both


def test_each_metric_is_put_together_by_its_rule(tmp_path: Path) -> None:
    two(tmp_path / "run")
    run = open_run(tmp_path / "run")
    steps = run.read("steps", ranks="merged")
    assert steps["step"].tolist() == [0, 1, 2]
    assert steps[["loss", "tokens", "grad_norm"]].to_numpy().tolist() == [[5.0, 200.0, 3.0]] * 3
    assert steps["routing_mode"].tolist() == ["on"] * 3
    layers = run.read(
        "layers", ["step", "site", "composite_gain_fwd", "composite_gain_fwd_max"], ranks="merged"
    )
    assert list(layers.columns) == ["step", "site", "composite_gain_fwd", "composite_gain_fwd_max"]
    assert layers.to_numpy().tolist() == [
        r for s in range(3) for r in ([s, "attn", 2.0, 3.0], [s, "ffn", 5.0, 3.0])
    ]
    assert run.problems == {}


def test_unless_asked_every_rank_is_read_by_itself(tmp_path: Path) -> None:
    two(tmp_path / "run")
    assert open_run(tmp_path / "run").read("steps")["rank"].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_nan_of_one_rank_stays_and_a_null_takes_no_part(tmp_path: Path) -> None:
    both = two(tmp_path / "run", close=False)
    both[0].append("steps", {"step": [3], "loss": [math.nan], "grad_norm": [1.0]})
    both[1].append("steps", {"step": [3], "loss": [4.0], "grad_norm": [math.nan]})
    both[0].append("steps", {"step": [4], "loss": [None]})
    both[1].append("steps", {"step": [4], "loss": [4.0]})
    for run in both:
        run.close()
    rows = (
        open_run(tmp_path / "run")
        .read_arrow("steps", ["loss", "grad_norm"], ranks="merged")
        .to_pylist()
    )
    assert math.isnan(rows[3]["loss"])
    assert math.isnan(rows[3]["grad_norm"]), "also where the rule is the largest"
    assert rows[4] == {"loss": 4.0, "grad_norm": None}


def test_attempts_are_not_mixed(tmp_path: Path) -> None:
    both = two(tmp_path / "run", close=False)
    for rank, run in enumerate(both):
        run.next_attempt()
        run.append("steps", {"step": [1], "loss": [10.0 + rank]})
        run.close()
    run = open_run(tmp_path / "run")
    assert run.read("steps", ["step", "loss"], ranks="merged").to_numpy().tolist() == [
        [0, 5.0],
        [1, 10.5],
    ]
    everything = run.read("steps", ["attempt", "step", "loss"], attempt="all", ranks="merged")
    assert everything.to_numpy().tolist() == [[0, 0, 5.0], [0, 1, 5.0], [0, 2, 5.0], [1, 1, 10.5]]


def test_a_rank_that_ends_early_is_a_caveat(tmp_path: Path) -> None:
    two(tmp_path / "run", steps=(5, 3))
    run = open_run(tmp_path / "run")
    assert run.read("steps", ["loss"], ranks="merged")["loss"].tolist() == [5.0] * 3 + [4.0] * 2
    assert run.problems == {"rank-1": "ends at step 2; later steps are of the other ranks"}
    assert health(run).problems == run.problems


def test_ranks_of_a_training_that_runs_may_be_some_steps_apart(tmp_path: Path) -> None:
    both = two(tmp_path / "run", steps=(5, 3), close=False)
    run = open_run(tmp_path / "run")
    run.read("steps")
    assert run.problems == {}
    both[0].append("steps", {"step": [500], "loss": [1.0]})
    run.read("steps")
    assert list(run.problems) == ["rank-1"], "so far behind, it is no longer its own pace"


@pytest.mark.parametrize("wreck", ["missing", "torn"])
def test_a_lost_rank_is_a_caveat_and_no_traceback(tmp_path: Path, wreck: str) -> None:
    two(tmp_path / "run", close=False)
    for journal in (tmp_path / "run" / "journal").glob("rank-1-*.arrows"):
        journal.unlink() if wreck == "missing" else journal.write_bytes(journal.read_bytes()[:200])
    run = open_run(tmp_path / "run")
    assert run.read("steps", ["loss"], ranks="merged")["loss"].tolist() == [4.0] * 3
    assert "rank-1" in run.problems
    assert "left no steps" in run.problems["rank-1"]


def test_a_run_of_one_rank_reads_the_same_either_way(make_run) -> None:
    run = make_run("one")
    for table in ("steps", "layers", "events"):
        assert run.read_arrow(table).equals(run.read_arrow(table, ranks="merged"))


def test_what_is_no_table_is_still_one_line(tmp_path: Path) -> None:
    two(tmp_path / "run")
    with pytest.raises(GeodiagError, match="there is no table 'step'"):
        open_run(tmp_path / "run").read("step", ["loss"], ranks="merged")


def test_merging_loses_no_place(tmp_path: Path) -> None:
    two(tmp_path / "run", steps=(2, 4))
    layers = open_run(tmp_path / "run").read("layers", ranks="merged")
    assert np.bincount(layers["step"]).tolist() == [2, 2, 2, 2]
    assert layers["step"].is_monotonic_increasing
