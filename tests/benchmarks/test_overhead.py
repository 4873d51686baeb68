"""The bench of recording's cost: its intervals by hand, and a small run of the whole."""

import importlib
import random
from pathlib import Path

import pytest
import torch

from tests.geodiag.store import kills


@pytest.fixture
def bench():
    return importlib.import_module("geodiag.benchmarks.overhead")


@pytest.mark.parametrize(
    ("n", "skip"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5), (100, 39)]
)
def test_the_interval_of_a_median_has_the_ranks_of_the_tables(bench, n: int, skip: int) -> None:
    found = bench.Estimate.of([float(i) for i in range(n)][::-1])
    assert (found.low, found.median, found.high) == (skip, (n - 1) / 2, n - 1 - skip)


def test_the_interval_holds_the_true_median_as_often_as_it_says(bench) -> None:
    rng = random.Random(0)
    estimates = [bench.Estimate.of([rng.expovariate(1.0) for _ in range(12)]) for _ in range(2000)]
    held = sum(e.low <= 0.6931 <= e.high for e in estimates) / 2000
    assert 0.95 <= held < 0.98
    assert sum(e.low <= 1.2 <= e.high for e in estimates) / 2000 < 0.9, (
        "and another value less often"
    )


def test_the_bench_measures_every_arm_in_turns_and_finds_the_same_losses(
    bench, tmp_path: Path
) -> None:
    data = str(kills.text(tmp_path))
    found = bench.compare(
        "tiny", torch.get_num_threads(), rounds=2, block=2, sequences=1, data=data
    )
    assert set(found["arms"]) == {"bare", "bare again", "every step", "every 10th step"}
    assert found["losses_bitwise_equal"]
    assert all(len(arm["seconds_a_step"]) == 2 for arm in found["arms"].values())
    assert found["arms"]["bare"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_a_busy_machine_and_a_control_that_is_off_are_said(bench) -> None:
    def result(load: float, low: float, high: float) -> dict:
        control = {
            "ratio": {"median": (low + high) / 2, "low": low, "high": high},
            "steps_per_second": 1.0,
        }
        return {"load_before": load, "runs": [{"threads": 1, "arms": {"bare again": control}}]}

    assert bench.warnings(result(0.1, 0.99, 1.01)) == []
    assert "busy" in bench.warnings(result(3.0, 0.99, 1.01))[0]
    assert "control is off" in bench.warnings(result(0.1, 1.02, 1.05))[0]
