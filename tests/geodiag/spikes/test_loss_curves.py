"""Reading loss curves from CSVs and runs, and what `geodiag spikes` prints about them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from geodiag.cli.spikes import spikes
from geodiag.errors import GeodiagError
from geodiag.run import Run
from geodiag.spikes.detector import SpikeDetector
from geodiag.spikes.loss_curves import Update, find_spikes, read_updates

app = typer.Typer()
app.command()(spikes)


def losses(n: int = 400) -> np.ndarray:
    return 3 + 0.03 * np.random.default_rng(0).standard_normal(n)


def write_csv(path: Path, values, header: str = "step,loss") -> str:
    path.write_text("\n".join([header, *(f"{i},{v}" for i, v in enumerate(values))]))
    return str(path)


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


# -- what is read ----------------------------------------------------------------------------


def test_columns_may_come_in_any_order_with_others_between_and_empty_losses_are_left_out(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "\ufeffLoss, time,Step,grad_norm\n2.5,9,1,0.5\n,9,2,0.5\n2.4,9,3,\nnan,9,4.0,1\n\n",
        encoding="utf-8",
    )
    first, second, third = read_updates(str(path))
    assert (first, second) == (Update(1, 2.5, 0.5), Update(3, 2.4, None))
    assert (third.step, third.grad_norm) == (4, 1.0)
    assert math.isnan(third.loss)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; pass a CSV with the columns step,loss"),
        ("step,loss\n", "has no recorded loss"),
        ("step,train\n1,2\n", "has no column loss; rename one (it has: step, train)"),
        ("iteration,value\n1,2\n", "has no column step and no column loss"),
        ("1,2.5\n2,2.4\n", "has no column step"),
        ("step,loss\n1,2.5\n2,high\n", "line 3: loss is 'high'; write a number, nan or inf"),
        ("step,loss\n1.5,2.5\n", "line 2: step is '1.5'; write a whole number"),
        ("step,loss\n,2.5\n", "line 2: step is ''; write a whole number"),
        ("step,loss\nnan,2.5\n", "line 2: step is 'nan'; write a whole number"),
        (b"PAR1\xff\xfe\x00", "it is not text; pass a CSV"),
    ],
)
def test_a_bad_csv_is_one_line_that_names_the_fix(
    tmp_path: Path, text: str | bytes, words: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GeodiagError) as error:
        read_updates(str(path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_path_and_a_folder_that_is_no_run_say_what_to_pass(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no.csv", "does not exist"), (tmp_path, "has no run.json")):
        with pytest.raises(GeodiagError, match=words) as error:
            read_updates(str(path))
        assert "or a CSV with the columns step,loss" in str(error.value)


def test_a_run_is_read_with_all_its_attempts_as_they_happened(tmp_path: Path) -> None:
    values = losses()
    run = Run.create(tmp_path / "run")
    for step in range(310):
        run.append(
            "steps",
            {"step": [step], "loss": [6.0 if step >= 300 else values[step]], "grad_norm": [1.0]},
        )
    run.next_attempt()
    for step in range(290, 400):
        run.append("steps", {"step": [step], "loss": [values[step]]})
    run.close()
    updates = read_updates(str(tmp_path / "run"))
    assert [u.step for u in updates] == [*range(310), *range(290, 400)]
    assert (updates[0].grad_norm, updates[-1].grad_norm) == (1.0, None)
    (spike,) = find_spikes(updates)
    assert (spike.kind, spike.onset, spike.end) == ("spike", 300, 290)


def test_a_run_without_losses_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.append("steps", {"step": [0], "grad_norm": [1.0]})
    run.close()
    with pytest.raises(GeodiagError, match="has no recorded loss"):
        read_updates(str(tmp_path / "run"))


def test_a_spike_that_was_open_when_the_detector_was_handed_over_is_listed() -> None:
    detector = SpikeDetector()
    for step, loss in enumerate([*losses(300), *[6.0] * 5]):
        detector.update(step, loss)
    (spike,) = find_spikes([Update(305 + i, 3.0) for i in range(10)], detector)
    assert (spike.kind, spike.detected, spike.end) == ("spike", 302, 305)


# -- what is printed -------------------------------------------------------------------------


def test_json_has_every_field_and_null_where_there_is_none(tmp_path: Path) -> None:
    values = losses()
    values[200:210] += 1
    values[300] = 6
    values[398:] = math.nan
    first, second, third = json.loads(printed(write_csv(tmp_path / "a.csv", values), "--json"))
    assert first.pop("score") > 20
    assert first == {
        "kind": "spike",
        "detected": 202,
        "onset": 200,
        "peak": first["peak"],
        "end": 210,
    }
    assert (second["kind"], second["detected"], second["end"]) == ("outlier", 301, 301)
    assert third == {
        "kind": "nonfinite",
        "detected": 398,
        "onset": 398,
        "peak": 398,
        "end": None,
        "score": None,
    }


def test_a_spike_still_on_at_the_end_is_listed_with_its_peak_so_far(tmp_path: Path) -> None:
    values = losses(310)
    values[300:] = np.linspace(5, 6, 10)
    path = write_csv(tmp_path / "a.csv", values)
    (spike,) = json.loads(printed(path, "--json"))
    assert (spike["peak"], spike["end"]) == (309, None)
    assert "still on" in printed(path)


def test_without_events_one_sentence_or_an_empty_list_is_printed(
    tmp_path: Path,
) -> None:
    path = write_csv(tmp_path / "a.csv", losses())
    assert printed(path) == "No spikes in 400 updates (steps 0 to 399).\n"
    assert json.loads(printed(path, "--json")) == []


def test_the_table_has_a_row_for_each_event(tmp_path: Path) -> None:
    values = losses()
    values[200:210] += 1
    values[300] = math.inf
    lines = printed(write_csv(tmp_path / "a.csv", values)).splitlines()
    assert lines[0].split() == ["kind", "detected", "onset", "peak", "end", "score"]
    assert lines[1].split()[:3] == ["spike", "202", "200"]
    assert lines[2].split() == ["nonfinite", "300", "300", "300", "301", "not", "finite"]
