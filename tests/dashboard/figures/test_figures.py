"""Figures: every extreme, gap and unit of the data is in the figure."""

import numpy as np
import plotly.graph_objects as go
import pytest

from geodiag.dashboard.data.grid import Grid
from geodiag.dashboard.data.timeline_marks import RoutingSpan, SpikeMark
from geodiag.dashboard.figures.colour_scale import shade
from geodiag.dashboard.figures.colours import oklab
from geodiag.dashboard.figures.depth_profile import Curve, profile
from geodiag.dashboard.figures.downsample import downsampled, nonfinite_steps
from geodiag.dashboard.figures.heat import Panel, heat_map
from geodiag.dashboard.figures.lines import Line, Strip, over_steps
from geodiag.dashboard.figures.maps import Tile, residual_maps
from geodiag.dashboard.figures.matrix import map_matrices
from geodiag.dashboard.figures.style import DARK, LIGHT
from geodiag.dashboard.figures.time_bins import binned, worst_step
from geodiag.dashboard.figures.timeline import timeline
from geodiag.metrics.schema import METRICS

GAIN = METRICS["layers", "composite_gain_fwd"]
MARGIN = METRICS["layers", "router_margin_p01"]
LOAD = METRICS["experts", "load"]
ROWS = ((0, 0), (0, 1), (1, 0), (1, 1))


def grid(values, metric=GAIN, steps=None) -> Grid:
    values = np.asarray(values, np.float32)
    steps = np.arange(values.shape[1]) if steps is None else np.asarray(steps)
    return Grid(metric, ROWS[: len(values)], steps, values)


def steps_table(n: int = 100, **columns) -> dict:
    table = {"step": np.arange(n), "loss": np.full(n, 2.0), "grad_norm": np.ones(n)}
    table |= {f"stage{i}_score": np.zeros(n) for i in (1, 2, 3)}
    return table | columns


# -- lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 123_456, 999_998, 999_999])
@pytest.mark.parametrize("height", [9.0, -9.0])
def test_a_spike_of_one_step_survives_a_million_steps(at, height):
    rng = np.random.default_rng(0)
    value = rng.normal(2, 0.05, 1_000_000).astype(np.float32)
    value[at] = height
    points = downsampled(np.arange(1_000_000), value)
    assert len(points.x) < 4000
    assert points.y[points.x == at] == [height]


def test_two_opposite_spikes_side_by_side_both_survive():
    value = np.full(1_000_000, 2.0, np.float32)
    value[500_000], value[500_001] = 50.0, -50.0
    points = downsampled(np.arange(1_000_000), value)
    assert points.y.max() == 50
    assert points.y.min() == -50


def test_a_spike_next_to_a_gap_survives():
    value = np.full(300_000, 2.0, np.float32)
    value[1000:1010], value[1010] = np.nan, 30.0
    assert np.nanmax(downsampled(np.arange(300_000), value).y) == 30


def test_every_tenth_point_alone_loses_the_spike():
    value = np.full(1_000_000, 2.0)
    value[123_457] = 9.0
    assert (
        value[::1000].max() == 2.0
    )  # the twin: what careless thinning does, and the test above would see


def test_what_was_not_measured_is_a_gap_and_never_zero():
    value = np.array([1, 1, 1, np.nan, np.nan, np.nan, 1, 1], np.float32)
    points = downsampled(np.arange(8), value)
    assert np.isnan(points.y).sum() == 1
    assert not (points.y == 0).any()
    assert points.x[np.isnan(points.y)] == [4]


def test_a_metric_of_every_tenth_step_is_one_line_and_not_all_gaps():
    value = np.full(100, np.nan, np.float32)
    value[::10] = 1.0
    assert not np.isnan(downsampled(np.arange(100), value).y).any()


def test_a_loss_that_is_not_finite_is_a_mark():
    loss = np.full(100, 2.0)
    loss[40] = np.inf  # what the grid makes of a measured NaN
    fig = timeline(steps_table(loss=loss), [], [], LIGHT)
    marks = [t for t in fig.data if t.name == "loss not finite"]
    assert list(marks[0].x) == [40]
    assert not np.isinf(fig.data[0].y).any()
    assert nonfinite_steps(np.arange(3), np.array([1, np.nan, 2])).size == 0


def test_series_without_values_are_left_out():
    line, gone = Line("a", np.arange(5), np.ones(5)), Line("b", np.arange(5), np.full(5, np.nan))
    fig = over_steps([Strip("x", [line, gone]), Strip("y", [gone])], LIGHT)
    assert [t.name for t in fig.data] == ["a"]
    assert (
        over_steps([Strip("y", [gone])], LIGHT, nothing="none here").layout.annotations[0].text
        == "none here"
    )


def test_a_rate_that_stayed_0_is_not_drawn_as_if_it_could_be_negative():
    def mode(values):
        return over_steps(
            [Strip("x", [Line("a", np.arange(3), np.array(values))])], LIGHT
        ).layout.yaxis.rangemode

    assert mode([0.0, 0.0, np.nan]) == "nonnegative"
    assert mode([0.0, -1.0, 2.0]) == "normal"


# -- the timeline -----------------------------------------------------------------------------


def test_the_timeline_marks_onset_peak_end_and_routing():
    loss = np.full(100, 2.0)
    loss[50:60] = 5.0
    spike = SpikeMark(kind="spike", onset=50, detected=52, peak=55, end=70, score=9.0)
    fig = timeline(
        steps_table(loss=loss), [spike], [RoutingSpan(mode="on", start=60, end=80)], LIGHT
    )
    named = {t.name: t for t in fig.data}
    assert list(named["spike onset"].x) == [50]
    assert (list(named["spike peak"].x), list(named["spike peak"].y)) == ([55], [5.0])
    bars = [(s.x0, s.x1) for s in fig.layout.shapes if s.type == "rect"]
    assert (50, 70) in bars
    assert (59.5, 80.5) in bars


def test_the_loss_axis_has_its_unit():
    fig = timeline(steps_table(), [], [], LIGHT)
    assert fig.layout.yaxis.title.text == f"loss, {METRICS['steps', 'loss'].unit}"
    assert fig.layout.xaxis.title.text == "step"


def test_without_stage_scores_the_step_axis_stays_and_a_sentence_replaces_the_map():
    steps = steps_table() | {f"stage{i}_score": np.full(100, np.nan, np.float32) for i in (1, 2, 3)}
    fig = timeline(steps, [], [], LIGHT)
    assert "No stage scores in this range." in [a.text for a in fig.layout.annotations]
    assert "y3" in [t.yaxis for t in fig.data]  # the axis that the steps are anchored to
    assert fig.layout.xaxis.anchor == "y3"
    scored = timeline(steps_table(), [], [], LIGHT)
    assert "No stage scores in this range." not in [a.text for a in scored.layout.annotations]


def test_a_run_of_one_step_is_visible_and_its_axis_has_that_tick():
    fig = timeline(steps_table(1), [], [], LIGHT)
    assert next(t for t in fig.data if t.name == "loss").mode == "lines+markers"
    assert (list(fig.layout.xaxis.range), fig.layout.xaxis.dtick) == ([-0.5, 0.5], 1)
    long = timeline(steps_table(100), [], [], LIGHT)
    assert next(t for t in long.data if t.name == "loss").mode == "lines"
    assert long.layout.xaxis.dtick is None


def test_maps_that_are_not_finite_are_replaced_by_a_sentence():
    nan, ones = np.full((4, 4), np.nan), np.eye(4)
    assert "not finite" in map_matrices({"res": nan}, LIGHT).layout.annotations[0].text
    assert (
        "not finite"
        in residual_maps([("now", [Tile("a", nan)])], LIGHT, "none").layout.annotations[0].text
    )
    assert (
        len(
            residual_maps(
                [("before", [Tile("a", ones)]), ("now", [Tile("a", nan)])], LIGHT, "none"
            ).data
        )
        == 1
    )


def test_a_long_sentence_in_an_empty_chart_is_broken_where_the_narrowest_card_ends():
    fig = map_matrices({}, LIGHT)
    lines = fig.layout.annotations[0].text.split("<br>")
    assert " ".join(lines) == "No token-mean maps were recorded for this site up to this step."
    assert len(lines) == 2


def test_an_empty_run_shows_that_it_waits_for_the_first_step():
    fig = timeline(steps_table(0), [], [], LIGHT)
    assert fig.layout.annotations[0].text == "Waiting for the first step."


def test_a_run_that_is_broken_from_its_first_step_is_drawn():
    fig = timeline(
        steps_table(loss=np.full(100, np.inf), grad_norm=np.full(100, np.inf)), [], [], DARK
    )
    assert isinstance(fig, go.Figure)
    assert len(next(t for t in fig.data if t.name == "loss not finite").x) == 100


# -- heat maps --------------------------------------------------------------------------------


def test_rows_of_a_heat_map_are_sites_with_the_first_on_top():
    fig = heat_map([Panel(grid([[1, 1], [2, 2], [3, 3], [4, 4]]), "t")], LIGHT)
    heat = fig.data[0]
    assert list(heat.y) == ["0.attn", "0.ffn", "1.attn", "1.ffn"]
    assert fig.layout.yaxis.autorange == "reversed"
    assert heat.customdata[0][0] == 1
    assert heat.customdata[3][1] == 4
    assert np.shape(heat.z) == (4, 2)


def test_gains_are_drawn_around_one_on_a_log_scale():
    fig = heat_map([Panel(grid([[0.5, 1.0, 8.0]]), "t")], LIGHT)
    assert fig.layout.coloraxis.cmin == pytest.approx(-fig.layout.coloraxis.cmax)
    assert list(fig.data[0].z[0]) == pytest.approx(np.log10([0.5, 1, 8]), rel=1e-6)
    assert fig.layout.coloraxis.cmax == pytest.approx(np.log10(8))
    # the twin: on a linear scale a halving would be paler than a gain of 1.6
    assert fig.data[0].z[0][0] != pytest.approx(0.5 - 1, rel=0.1)


def test_columns_are_the_worst_of_their_steps_and_a_spike_of_one_step_stays():
    values = np.ones((2, 50_000), np.float32)
    values[1, 31_415] = 7.0
    columns = binned(grid(values))
    assert columns.values_RB.shape[1] <= 1200
    assert columns.values_RB.max() == 7
    assert columns.merged
    hit = int(columns.values_RB[1].argmax())
    assert columns.left_B[hit] <= 31_415 < columns.left_B[hit] + columns.width
    assert worst_step(grid(values), 1, int(columns.left_B[hit]), columns.width) == 31_415


def test_where_low_is_bad_the_smallest_stays():
    values = np.ones((1, 50_000), np.float32)
    values[0, 777] = 0.01
    assert binned(grid(values, MARGIN)).values_RB.min() == np.float32(0.01)
    assert binned(grid(values, GAIN)).values_RB.min() == 1  # the twin: the largest would hide it


@pytest.mark.parametrize("odd", [0.0, 0.9])
def test_where_neither_end_is_bad_both_extremes_stay(odd):
    values = np.full((1, 50_000), 0.125, np.float32)
    values[0, 777] = odd
    assert np.float32(odd) in binned(grid(values, LOAD)).values_RB


def test_unmeasured_columns_are_gaps_and_a_cadence_is_not():
    values = np.full((1, 100), np.nan, np.float32)
    values[0, 0:40:10] = values[0, 80:100:10] = 1.0
    columns = binned(grid(values))
    assert columns.width == 10
    assert list(np.isnan(columns.values_RB[0])) == [False] * 4 + [True] * 4 + [False] * 2
    assert not columns.merged


def test_zooming_in_shows_single_steps():
    values = np.ones((1, 50_000), np.float32)
    assert binned(grid(values)).width > 1
    assert binned(grid(values).window(100, 600)).width == 1


def test_a_value_that_is_not_finite_is_a_cross_and_not_a_gap():
    fig = heat_map([Panel(grid([[1, np.inf, 1], [1, 1, np.nan]]), "t")], LIGHT)
    crosses = fig.data[1]
    assert (list(crosses.x), list(crosses.y)) == ([1], ["0.attn"])


def test_a_load_of_zero_is_the_deepest_colour_and_not_a_gap():
    values = np.array([[0.0, 0.5], [0.5, 0.5]], np.float32)
    fig = heat_map(
        [Panel(Grid(LOAD, ((0, 0), (0, 1)), np.arange(2), values), "t")],
        LIGHT,
        experts=True,
        centre=0.5,
    )
    assert fig.data[0].z[0][0] < fig.layout.coloraxis.cmin
    assert not np.isnan(fig.data[0].z).any()


def test_a_metric_that_a_run_lacks_is_replaced_by_a_sentence():
    fig = heat_map([Panel(grid(np.full((4, 5), np.nan)), "t")], LIGHT, nothing="it has no such map")
    assert fig.layout.annotations[0].text == "it has no such map"


def test_panels_share_one_colour_axis_and_one_time_axis():
    fig = heat_map([Panel(grid(np.ones((4, 5))), "a"), Panel(grid(np.full((4, 5), 3)), "b")], LIGHT)
    assert {t.coloraxis for t in fig.data} == {"coloraxis"}
    assert {t.xaxis for t in fig.data} == {None}


def test_shares_read_as_percent_and_gains_as_factors():
    share, gain = METRICS["layers", "flip_rate"], np.array([0.8, 1.3])
    assert shade(share, np.array([0.0, 0.6]), LIGHT).axis["colorbar"]["tickformat"] == ".3~p"
    assert all(t.startswith("×") for t in shade(GAIN, gain, LIGHT).axis["colorbar"]["ticktext"])
    strip = Strip("clamped", [Line("gate", np.arange(3), np.array([0.0, 0.2, 0.4]))], "share")
    axis = over_steps([strip], LIGHT).layout.yaxis
    assert (axis.title.text, axis.tickformat) == ("clamped", ".3~p")
    for metric, format in ((share, ".3p"), (GAIN, "×%{")):
        fig = heat_map([Panel(grid(np.full((4, 5), 0.5), metric), "t")], LIGHT)
        assert format in fig.data[0].hovertemplate


def test_values_of_every_size_get_a_colour_axis_with_few_ticks():
    for low, high in ((1.0, 1.0001), (0.2, 9.0), (1e-4, 1e6), (1.0, 1e12)):
        for metric in (GAIN, METRICS["layers", "stream_amax"]):
            axis = shade(metric, np.array([low, high]), LIGHT).axis
            assert axis["cmin"] < axis["cmax"]
            assert len(axis["colorbar"].get("tickvals", [])) <= 9


# -- profile, matrices, colours ---------------------------------------------------------------


def test_the_profile_has_one_point_per_site_in_order():
    g = grid([[1, 2], [1, 3], [1, 4], [1, 5]])
    fig = profile([Curve("forward", g, g.at(1))], LIGHT, row="1.attn")
    assert list(fig.data[0].x) == [2, 3, 4, 5]
    assert list(fig.data[0].y) == ["0.attn", "0.ffn", "1.attn", "1.ffn"]
    assert fig.layout.yaxis.autorange == "reversed"


def test_a_profile_takes_the_newest_sample_up_to_its_step():
    g = grid([[1, np.nan, 3]])
    assert g.at(1) == [1]
    assert g.at(2) == [3]
    assert np.isnan(grid([[np.nan, 1]]).at(0)).all()


def test_matrices_are_not_transposed():
    m = np.array([[1.0, 0.2], [0.0, 1.0]])
    fig = map_matrices({"res": m}, LIGHT)
    assert fig.data[0].z[0][1] == 0.2
    assert fig.layout.yaxis.autorange == "reversed"
    assert not np.array_equal(fig.data[0].z, m.T)  # the twin: a symmetric example would not tell


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_equal_steps_of_value_are_equal_steps_of_lightness(theme):
    light = np.array([oklab(c)[0] for _, c in theme.heat])
    step = np.diff(light)
    assert (np.sign(step) == np.sign(step[0])).all()
    assert np.abs(step / step.mean() - 1).max() < 0.15
    half = len(theme.gain) // 2
    middle = oklab(theme.gain[half][1])[0]
    ends = [oklab(theme.gain[i][1])[0] for i in (0, -1)]
    assert all(abs(e - middle) > 0.4 for e in ends)


def test_a_rainbow_would_fail_the_lightness_test():
    light = np.array([oklab(c)[0] for c in ("#0000ff", "#00ffff", "#00ff00", "#ffff00", "#ff0000")])
    step = np.diff(light)
    assert not (np.sign(step) == np.sign(step[0])).all()
