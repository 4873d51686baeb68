"""Incomplete records: every cascade is an answer with its caveat, or one line that names the
fix.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geodiag.anomaly.series_window import read_series
from geodiag.cascade.explain import cascades, explain, stage_map
from geodiag.errors import GeodiagError
from geodiag.events import Event
from geodiag.run import Run
from geodiag.spikes.event import Spike
from tests.geodiag.cascade.planted import Planted
from tests.geodiag.cascade.test_explain import expert_fault


def trust(run: Run | Path) -> tuple[float, str]:
    """Confidence and caveats of the first cascade."""
    found = cascades(run)[0]
    json.dumps(found.as_json(), allow_nan=False)
    return found.confidence, "; ".join(found.caveats)


def test_without_the_expert_table_the_layer_is_still_found(tmp_path: Path) -> None:
    whole, none = trust(expert_fault().write(tmp_path / "whole"))
    assert none == ""
    run = expert_fault(skip=("experts",)).write(tmp_path / "run")
    found = explain(run)
    assert (found.stage, found.layer, found.expert) == (1, 2, None)
    assert any("table experts has no rows" in c for c in found.caveats)
    assert found.confidence < whole


def test_without_layers_nothing_is_claimed(tmp_path: Path) -> None:
    found = explain(expert_fault(skip=("layers", "experts")).write(tmp_path / "run"))
    assert (found.stage, found.layer, found.onset, found.confidence) == (None, None, None, 0)
    assert any("table layers has no rows" in c for c in found.caveats)


def test_without_events_the_detector_looks_at_the_loss_again(tmp_path: Path) -> None:
    (found,) = cascades(expert_fault(skip=("events",)).write(tmp_path / "run"))
    assert abs(found.spike_onset - 250) <= 1
    assert (found.stage, found.layer, found.expert) == (1, 2, 3)


def test_without_steps_a_spike_on_record_is_still_explained(tmp_path: Path) -> None:
    found = explain(expert_fault(skip=("steps",)).write(tmp_path / "run"))
    assert (found.stage, found.layer) == (1, 2)
    assert any("table steps has no rows" in c for c in found.caveats)


@pytest.mark.parametrize("onset", [0, 1, 5, 299])
def test_a_spike_at_the_first_or_last_step_is_answered(tmp_path: Path, onset: int) -> None:
    run = Planted(spike=onset).write(tmp_path / "run")
    confidence, words = trust(run)
    assert confidence == 0
    assert ("before the loss, so the normal range is uncertain" in words) == (onset < 20)
    assert stage_map(run, max(0, onset - 5), onset + 5).scores.shape[0] == 3


def test_a_fault_soon_after_the_start_is_explained_with_less_confidence(tmp_path: Path) -> None:
    early = explain(expert_fault(at=24, spike=28).write(tmp_path / "early"))
    late = explain(expert_fault().write(tmp_path / "late"))
    assert early.confidence < 0.6 * late.confidence


def test_overlapping_spikes_are_explained_separately_and_the_second_has_a_caveat(
    tmp_path: Path,
) -> None:
    planted = expert_fault()
    run = planted.write(tmp_path / "run", close=False)
    planted.record_spike(run, 258)
    run.close()
    first, second = cascades(run)
    assert (first.spike_onset, second.spike_onset) == (250, 258)
    assert any("was not over" in c for c in second.caveats)
    assert not any("was not over" in c for c in first.caveats)
    assert second.confidence < first.confidence


def test_a_sparse_cadence_is_a_caveat_and_the_layer_is_still_found(tmp_path: Path) -> None:
    planted = expert_fault(at=2300, steps=2600, spike=2350, every=10)
    found = explain(planted.write(tmp_path / "run"))
    assert (found.stage, found.layer, found.onset) == (1, 2, 2300)
    assert any("every 10 steps" in c for c in found.caveats)


def test_holes_in_the_cadence_are_named(tmp_path: Path) -> None:
    planted = expert_fault()
    run = Run.create(tmp_path / "run")
    whole = Planted(steps=300, shifts=planted.shifts, spike=250)
    whole.append(_Holes(run, 200, 224))
    run.close()
    found = explain(run)
    assert any("nothing was sampled from step 200 to 224" in c for c in found.caveats)
    assert found.layer == 2


class _Holes:
    """A run whose rows of layers and experts between two steps are lost."""

    def __init__(self, run: Run, first: int, last: int) -> None:
        self.run, self.first, self.last = run, first, last

    def append(self, table: str, columns: dict[str, Any]) -> None:
        step = np.asarray(columns["step"])
        keep = (step < self.first) | (step > self.last) | (table == "steps")
        cut = {
            n: v[keep] if isinstance(v, np.ndarray) else list(np.array(v)[keep])
            for n, v in columns.items()
        }
        self.run.append(table, cut)

    def event(self, event: Event) -> None:
        self.run.event(event)


def test_a_spike_that_was_rolled_back_is_explained_from_its_own_attempt(tmp_path: Path) -> None:
    run = expert_fault().write(tmp_path / "run", close=False)
    run.next_attempt()
    Planted(spike=None, seed=5).append(run, first=225)  # the second attempt has no fault
    run.close()
    (found,) = cascades(run)
    assert (found.stage, found.layer, found.expert, found.onset) == (1, 2, 3, 230)
    assert any("restarted" in c for c in found.caveats)
    now = explain(run, 240)
    assert now.spike is None or now.spike_onset == 250
    assert stage_map(run, 230, 249).scores[0].max() < 8, "the newest attempt is what the map shows"


def test_ranks_without_rows_are_a_caveat(tmp_path: Path) -> None:
    planted = expert_fault()
    run = planted.write(tmp_path / "run", close=False, world_size=4)
    second = Run.create(tmp_path / "run", rank=1, world_size=4, attempt=0)
    Planted(spike=None, shifts=planted.shifts).append(second)
    second.close()
    run.close()
    found = explain(tmp_path / "run")
    assert (found.stage, found.layer) == (1, 2)
    assert any("2 of 4 ranks" in c for c in found.caveats)


def test_no_rank_hides_the_values_of_another_one(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", world_size=2)
    run.append(
        "steps", {"step": [0, 1], "loss": [2.0, 2.0], "lr": [1e-3, 1e-3], "data_shift": [0.5, 0.5]}
    )
    second = Run.create(tmp_path / "run", rank=1, world_size=2, attempt=0)
    second.append("steps", {"step": [0, 1], "loss": [2.0, 4.0], "data_shift": [0.1, 0.1]})
    second.close()
    run.close()
    outcome = read_series(Run.open(tmp_path / "run"), 0, 1).outcome
    assert outcome["lr"].tolist() == pytest.approx([1e-3, 1e-3])
    assert outcome["data_shift"].tolist() == pytest.approx([0.3, 0.3])
    assert outcome["loss"].tolist() == pytest.approx([2.0, 3.0])


def test_a_spike_long_after_the_last_readable_row_is_answered(tmp_path: Path) -> None:
    run = Planted(steps=300, spike=None).write(tmp_path / "run")
    late = Spike(kind="spike", detected=410, onset=400, peak=402, end=None, score=9.0)
    found = explain(run, late)
    assert (found.onset, found.layer) == (None, None)
    assert found.caveats


def test_a_run_that_is_still_written_is_read_as_it_stands(tmp_path: Path) -> None:
    run = expert_fault(steps=252, spike=250).write(tmp_path / "run", close=False)
    found = explain(tmp_path / "run")
    assert (found.stage, found.layer, found.onset) == (1, 2, 230)
    run.close()


def test_an_attempt_is_read_whole_while_the_next_one_begins(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.append("steps", {"step": range(20), "loss": [1.0] * 20})
    before = Run.open(tmp_path / "run")
    run.next_attempt()
    run.append("steps", {"step": range(10, 15), "loss": [2.0] * 5})
    assert read_series(before, 0, 19, attempt=0).outcome["loss"].tolist() == [1.0] * 20
    assert read_series(before, 0, 19, attempt=1).outcome["loss"].tolist() == [1.0] * 10 + [2.0] * 5
    run.close()


def test_a_part_that_cannot_be_read_is_a_caveat(tmp_path: Path) -> None:
    run = expert_fault().write(tmp_path / "run")
    part = next((tmp_path / "run/experts/rank-0").glob("*.parquet"))
    part.write_bytes(b"not parquet")
    found = explain(tmp_path / "run")
    assert (found.layer, found.expert) == (2, None)
    assert any("could not be read" in c for c in found.caveats)
    assert run.name == "run"


def test_an_event_that_makes_no_sense_is_no_spike(tmp_path: Path) -> None:
    run = expert_fault().write(tmp_path / "run", close=False)
    for data in (
        {},
        {"kind": "spike", "onset": "soon", "detected": 3},
        {"kind": "party", "onset": 1, "detected": 2},
    ):
        run.event(Event(step=100, kind="spike", message="?", data=data))
    run.close()
    assert [c.spike_onset for c in cascades(run)] == [250]


def test_an_empty_run_is_one_line(tmp_path: Path) -> None:
    Run.create(tmp_path / "run").close()
    assert cascades(tmp_path / "run") == []
    with pytest.raises(GeodiagError, match="no spike"):
        explain(tmp_path / "run")
    with pytest.raises(GeodiagError, match="no step"):
        explain(tmp_path / "run", 10)


def test_on_the_command_line(tmp_path: Path, cli: Any) -> None:
    expert_fault().write(tmp_path / "run")
    result = cli("cascade", tmp_path / "run", "--json")
    assert result.exit_code == 0
    (one,) = json.loads(result.output)
    assert (one["stage"], one["layer"], one["expert"], one["spike_onset"]) == (1, 2, 3, 250)
    shown = cli("cascade", tmp_path / "run", "--spike", 235)
    assert shown.exit_code == 0
    assert "layer 2" in shown.output
    assert "SwiGLU clamping" in shown.output
    Planted(spike=None).write(tmp_path / "calm")
    assert json.loads(cli("cascade", tmp_path / "calm", "--json").output) == []
    assert "no cascade" in cli("cascade", tmp_path / "calm").output
    wrong = cli("cascade", tmp_path / "run", "--spike", 4000)
    assert wrong.exit_code == 1
    assert wrong.output.count("\n") == 1
