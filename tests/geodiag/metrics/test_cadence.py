"""Cadence: names and numbers become steps, layers and one clear line where they make no sense."""

import pytest

from geodiag.errors import GeodiagError
from geodiag.metrics.cadence import Cadence, parse_every, parse_layers
from geodiag.metrics.schema import METRICS


def test_every_metric_but_those_of_steps_has_a_cadence() -> None:
    every = Cadence.of().every
    assert set(every) == {f"{t}.{n}" for t, n in METRICS if t != "steps"} | {"matrices"}
    for (table, name), metric in METRICS.items():
        if table != "steps":
            assert every[f"{table}.{name}"] == metric.every


def test_the_longest_beginning_of_a_name_wins_in_whatever_order_it_is_given() -> None:
    for asked in (
        {"amax_gain": 4, "amax_gain_fwd": 1, "": 7},
        {"": 7, "amax_gain_fwd": 1, "amax_gain": 4},
    ):
        every = Cadence.of(asked).every
        assert every["layers.amax_gain_fwd"] == every["layers.amax_gain_fwd_max"] == 1
        assert every["layers.amax_gain_bwd"] == 4
        assert every["layers.stream_rms"] == every["experts.load"] == 7
        assert every["layers.flip_rate"] == 10, "probes have a cadence of their own"


def test_a_table_is_a_beginning_too() -> None:
    every = Cadence.of({"tokens": 5, "matrices": 100, "domains.loss": 3}).every
    assert {n: p for n, p in every.items() if n.startswith("tokens.")} == dict.fromkeys(
        (
            "tokens.norm",
            "tokens.projection_1",
            "tokens.projection_2",
            "tokens.margin",
            "tokens.flipped",
        ),
        5,
    )
    assert every["matrices"] == 100
    assert every["domains.loss"] == 3
    assert every["domains.tokens"] == 1, "a metric of the table's name is another thing"


def test_slow_probes_keep_their_ratio_to_the_others() -> None:
    every = Cadence.of(probe_every=4).every
    assert (every["layers.flip_rate"], every["layers.curvature"]) == (4, 20)
    assert every["layers.amax_gain_fwd"] == 1


def test_what_is_due_is_what_divides_the_step() -> None:
    cadence = Cadence.of({"": 2, "flip_rate": 3, "curvature": 6})
    assert "layers.stream_rms" in cadence.due(4)
    assert "layers.flip_rate" not in cadence.due(4)
    assert {"layers.stream_rms", "layers.flip_rate", "layers.curvature"} <= cadence.due(6)
    assert cadence.due(1) == frozenset()
    assert cadence.due(4) is cadence.due(8), (
        "the same set is the same object, so that a step costs nothing"
    )


def test_a_runs_cadence_is_read_back_from_its_manifest() -> None:
    cadence = Cadence.of({"amax_gain": 3}, 20, (0, 2))
    assert Cadence.of_run({"config": {"cadence": cadence.record()}}) == cadence
    for old in ({}, {"config": None}, {"config": {"cadence": "x"}}):
        assert Cadence.of_run(old) == Cadence.of()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"curvatur_": 5}, "did you mean curvature"),
        ({"record_sec": 5}, "table steps"),
        ({"zzz": 1}, "docs/metrics.md"),
    ],
)
def test_an_unknown_metric_is_one_line_with_the_fix(asked: dict, said: str) -> None:
    with pytest.raises(GeodiagError, match=said):
        Cadence.of(asked)


def test_words_of_the_command_line_become_a_mapping() -> None:
    assert parse_every(["10", "amax_gain=1", "tokens=5"]) == {"": 10, "amax_gain": 1, "tokens": 5}
    for wrong in ("x", "0", "amax_gain=", "=3", "amax_gain=0", "-1", "1.5"):
        with pytest.raises(GeodiagError, match=r"METRIC=STEPS"):
            parse_every([wrong])


def test_layers_are_ranges_open_or_closed() -> None:
    assert parse_layers("0-2,5-", 7) == (0, 1, 2, 5, 6)
    assert parse_layers([3, 1], 4) == parse_layers(" 1, 3", 4) == (1, 3)
    assert parse_layers(None, 4) is None


@pytest.mark.parametrize("wrong", ["4", "0-9", "7-", "-3", "a", "3-1", "", [9], []])
def test_layers_that_the_model_does_not_have_are_one_line_with_the_fix(wrong) -> None:
    with pytest.raises(GeodiagError, match="pass some of 0 to 3"):
        parse_layers(wrong, 4)
