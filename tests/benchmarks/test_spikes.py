"""The benchmark of spike detectors: counts of hits, delays and false alarms, and each rule."""

from pathlib import Path

import pytest

from geodiag.benchmarks.spike_labels import Curve, Label
from geodiag.benchmarks.spike_rules import RULES
from geodiag.benchmarks.spike_scores import Score, score
from geodiag.benchmarks.spikes import bench
from geodiag.benchmarks.spikes_page import markdown
from geodiag.spikes.loss_curves import Update


def curve(*labels: Label) -> Curve:
    return Curve("A", [Update(i, 1.0) for i in range(1000)], list(labels))


@pytest.mark.parametrize(
    ("alarms", "hits", "false", "delays"),
    [
        ([], 0, 0, []),
        ([497], 1, 0, [-8]),
        ([496], 0, 1, []),
        ([525], 1, 0, [20]),
        ([526], 0, 0, []),  # within the spike, but too late to be a hit
        ([505, 507, 580], 1, 0, [0]),
        ([591], 0, 1, []),
        ([100, 150, 201], 0, 2, []),  # 50 rows apart is one false alarm, 51 is two
        ([690, 720], 0, 0, []),
        ([689, 721], 0, 1, []),
    ],
)
def test_hits_delays_and_false_alarms_are_counted_as_defined(alarms, hits, false, delays) -> None:
    spike = Label("spike", onset=500, breakout=505, end=540)
    unclear = Label("ambiguous", onset=700, breakout=705, end=710)
    blip = Label("blip", onset=200, breakout=200, end=200)
    found = Score()
    score(alarms, curve(spike, unclear, blip), found)
    assert (found.hits, found.false, found.delays) == (hits, false, delays)
    assert (found.spikes, found.rows) == (1, 1000)


def test_every_rule_detects_a_jump_to_ten_times_the_loss_and_none_alarms_on_a_quiet_loss() -> None:
    quiet = [Update(i, 3 + 0.01 * ((i * 7919) % 13 - 6)) for i in range(1200)]
    loud = [u._replace(loss=30.0) if 1100 <= u.step < 1110 else u for u in quiet]
    for name, rule in RULES.items():
        alarms = list(rule(loud))
        assert alarms, name
        assert 1100 <= alarms[0] <= 1102, name
        assert not list(rule(quiet)), name


def test_the_bench_reads_a_folder_and_writes_every_rule_into_the_table(
    tmp_path: Path,
) -> None:
    rows = [
        f"{i},{30.0 if 300 <= i < 320 else 3 + 0.01 * ((i * 7919) % 13 - 6)}" for i in range(600)
    ]
    (tmp_path / "one.csv").write_text("\n".join(["step,loss", *rows]))
    (tmp_path / "labels.csv").write_text(
        "series,group,type,onset,breakout,peak,end\none,A,spike,300,300,305,320\ngone,B,none,,,,\n"
    )
    result = bench(tmp_path, sensitivity=False)
    ours = result["rules"]["geodiag SpikeDetector"]["A"]
    assert (ours["f1"], ours["delay"], ours["false_per_10k"]) == (1.0, 2, 0.0)
    assert result["microseconds_per_update"] > 0
    assert all(name in markdown(result) for name in RULES)
