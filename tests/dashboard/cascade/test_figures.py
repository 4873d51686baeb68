"""The cascade figure: rings at the recorded onsets, and a path from the origin to the loss."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from geodiag.cascade.explain import Cascade, Evidence, Onset, StageMap
from geodiag.dashboard.data.step_table import SupersededSteps
from geodiag.dashboard.data.timeline_marks import Mark, RoutingSpan
from geodiag.dashboard.data.trajectory import Trajectory
from geodiag.dashboard.figures.cascade import CascadeScene, cascade_figure
from geodiag.dashboard.figures.colour_scale import Z_MAX, Z_MIN, robust_z, z_shade
from geodiag.dashboard.figures.colours import hues, oklab
from geodiag.dashboard.figures.maps import Tile, residual_maps
from geodiag.dashboard.figures.small_multiples import Strip, small_multiples
from geodiag.dashboard.figures.style import DARK, LIGHT
from geodiag.dashboard.figures.timeline import timeline
from geodiag.dashboard.figures.trajectory import trajectories

STEPS = np.arange(100, 200)


def onset(stage, layer, step, metric="gate_amax", expert=None) -> Onset:
    return Onset(
        stage=stage, layer=layer, site="ffn", expert=expert, step=step, score=20.0, metric=metric
    )


LOSS = Onset(stage=None, layer=None, site=None, expert=None, step=160, score=9.0, metric="loss")
GATE = Evidence(
    stage=1,
    layer=3,
    site="ffn",
    expert=5,
    metric="gate_amax",
    step=140,
    score=30.0,
    value=38.0,
    usual=4.2,
    unit="1",
)
FOUND = Cascade(
    spike={"kind": "spike", "onset": 160, "detected": 162, "peak": 165, "end": 180},
    spike_onset=160,
    stage=1,
    layer=3,
    site="ffn",
    expert=5,
    domain=None,
    onset=140,
    lead=20,
    cause="layer",
    confidence=0.9,
    defence="SwiGLU clamping",
    evidence=(GATE,),
    alternatives=(),
    words="",
    caveats=(),
    path=(
        onset(1, 3, 140, expert=5),
        onset(2, 4, 148, "flip_rate"),
        onset(2, 5, 150, "flip_rate"),
        onset(3, 7, 155, "composite_gain_fwd"),
        onset(1, 7, 163),
        LOSS,
    ),
)


def cascade(**changes) -> Cascade:
    return replace(FOUND, **changes)


def scene(scores=None, layers=8, **changes) -> CascadeScene:
    scores = np.ones((3, layers, 100), np.float32) if scores is None else scores
    steps = {"step": STEPS, "loss": np.where(STEPS < 160, 2.0, 3.0)}
    usual = CascadeScene(
        window=(100, 199), steps=steps, stages=StageMap(STEPS, np.arange(layers), scores)
    )
    return replace(usual, **changes)


def named(fig, name):
    return [t for t in fig.data if t.name == name]


def paths(fig) -> list[tuple[float, float, float, float]]:
    """(x0, y0, x1, y1) of every curved piece, in order."""
    out = []
    for shape in fig.layout.shapes:
        if shape.type == "path":
            first, last = shape.path.removeprefix("M ").split(" C ")
            out.append((*map(float, first.split(",")), *map(float, last.split(" ")[-1].split(","))))
    return out


# -- the picture ------------------------------------------------------------------------------


def test_the_first_three_traces_are_the_stages_so_that_a_click_knows_where_it_was():
    scores = np.stack([np.full((8, 100), v, np.float32) for v in (5, 6, 7)])
    fig = cascade_figure(scene(scores), LIGHT, cascade())
    assert [t.name for t in fig.data[:3]] == ["stage 1", "stage 2", "stage 3"]
    assert [float(t.customdata[0][0]) for t in fig.data[:3]] == [5, 6, 7]
    empty = cascade_figure(scene(np.full((3, 8, 100), np.nan, np.float32)), LIGHT)
    assert [t.yaxis for t in empty.data[:3]] == ["y2", "y3", "y4"]


def test_a_score_of_one_step_survives_a_thousand_columns():
    scores = np.ones((3, 4, 5000), np.float32)
    scores[1, 2, 3210] = 40
    long = {"step": np.arange(5000), "loss": np.ones(5000)}
    given = {
        "window": (0, 4999),
        "steps": long,
        "stages": StageMap(np.arange(5000), np.arange(4), scores),
    }
    fig = cascade_figure(scene(layers=4, **given), LIGHT)
    z = np.array(fig.data[1].customdata)
    assert z.shape[1] < 1300
    assert z[2].max() == 40
    assert z[1].max() == 1


def test_the_path_leads_from_the_origin_through_the_first_onset_of_each_stage_to_the_loss():
    fig = cascade_figure(scene(), LIGHT, cascade())
    pieces = paths(fig)
    assert [(p[0], p[2]) for p in pieces] == [(140, 148), (148, 155), (155, 160)]
    for before, after in pairwise(pieces):
        assert before[2:] == after[:2]
    low, high = fig.layout.yaxis2.domain
    assert low < pieces[0][1] < high  # in stage 1's map
    assert pieces[0][1] == pytest.approx(
        high - 3.5 / 8 * (high - low)
    )  # in the middle of layer 3's row
    low, high = fig.layout.yaxis.domain
    assert low < pieces[-1][3] < high  # on the loss


def test_what_left_its_range_after_the_loss_is_no_part_of_the_path():
    late = cascade(path=(onset(1, 3, 140), onset(3, 7, 163), LOSS))
    fig = cascade_figure(scene(), LIGHT, late)
    assert [(p[0], p[2]) for p in paths(fig)] == [(140, 160)]
    assert list(named(fig, "onsets of stage 3")[0].x) == [163]  # but it is there to see


def test_every_onset_has_its_ring_in_its_own_map_and_layer():
    fig = cascade_figure(scene(), LIGHT, cascade())
    rings = {
        t.yaxis: (list(t.x), list(t.y)) for t in fig.data if (t.name or "").startswith("onsets")
    }
    assert rings == {
        "y2": ([140, 163], ["3", "7"]),
        "y3": ([148, 150], ["4", "5"]),
        "y4": ([155], ["7"]),
    }
    sizes = named(fig, "onsets of stage 1")[0].marker.size
    assert sizes[0] > 2 * sizes[1]


def test_the_labels_have_place_measurement_and_delay():
    notes = [
        a.text for a in cascade_figure(scene(), LIGHT, cascade()).layout.annotations if a.showarrow
    ]
    assert notes[0] == "<b>layer 3 · ffn · expert 5</b><br>gate_amax 38 (usually 4.2)"
    assert notes[1] == "<b>layers 4–5</b><br>flip_rate 20 σ, 8 steps later"
    assert notes[-1] == "loss leaves its trend<br><b>20 steps later</b>"


def test_a_label_stays_in_its_panel_and_on_the_quiet_side():
    for layer in range(8):
        fig = cascade_figure(
            scene(), LIGHT, cascade(layer=layer, path=(onset(1, layer, 140), LOSS))
        )
        note = next(a for a in fig.layout.annotations if a.showarrow and "layer" in a.text)
        height = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
        low, high = fig.layout.yaxis2.domain
        assert low < note.y - note.ay / height < high
        assert note.ax < 0
    early = cascade_figure(scene(), LIGHT, cascade(onset=105, path=(onset(1, 3, 105), LOSS)))
    assert next(a for a in early.layout.annotations if a.showarrow and "layer" in a.text).ax > 0


def test_a_cause_outside_the_layers_begins_at_the_loss_and_is_named():
    lr = replace(
        GATE, stage=None, layer=None, site=None, expert=None, metric="lr", value=0.03, usual=0.001
    )
    found = cascade(
        stage=None,
        layer=None,
        expert=None,
        cause="lr",
        onset=158,
        lead=2,
        evidence=(lr,),
        path=(onset(2, 1, 159), LOSS),
    )
    fig = cascade_figure(scene(), LIGHT, found)
    assert paths(fig)[0][:2] == (158, fig.layout.yaxis.domain[0])
    assert any("learning rate ×30" in (a.text or "") for a in fig.layout.annotations)
    batch = cascade(
        stage="data",
        layer=None,
        expert=None,
        cause="data",
        domain="codecs",
        onset=160,
        lead=0,
        path=(),
    )
    assert any(
        "the batch: codecs" in (a.text or "")
        for a in cascade_figure(scene(), LIGHT, batch).layout.annotations
    )


def test_without_a_precursor_there_is_the_loss_and_no_path():
    none = cascade(
        stage=None,
        layer=None,
        expert=None,
        cause=None,
        onset=None,
        lead=None,
        evidence=(),
        path=(LOSS,),
    )
    fig = cascade_figure(scene(), LIGHT, none)
    assert paths(fig) == []
    assert list(named(fig, "the loss")[0].x) == [160]


def test_a_layer_that_is_not_in_the_map_raises_no_error():
    strange = cascade(path=(onset(1, 99, 140), onset("data", None, 141), LOSS))
    assert cascade_figure(scene(), LIGHT, strange, cell=(1, 99, 140)) is not None


def test_layers_need_not_begin_at_0_nor_follow_one_another():
    stages = StageMap(STEPS, np.array([2, 3, 7]), np.ones((3, 3, 100), np.float32))
    fig = cascade_figure(scene(stages=stages), LIGHT, cascade(), cell=(1, 7, 120))
    assert list(fig.data[0].y) == ["2", "3", "7"]
    low, high = fig.layout.yaxis2.domain
    assert paths(fig)[0][1] == pytest.approx(high - 1.5 / 3 * (high - low))
    frames = [s for s in fig.layout.shapes if s.type == "rect" and s.yref == "y2"]
    assert {(s.y0, s.y1) for s in frames} == {(1.5, 2.5)}


def test_a_stage_without_scores_shows_the_reason_and_the_others_are_drawn():
    scores = np.ones((3, 8, 100), np.float32)
    scores[1] = np.nan
    fig = cascade_figure(scene(scores, missing={2: "no router here"}), LIGHT, cascade())
    assert "no router here" in [a.text for a in fig.layout.annotations]
    assert [t.type for t in fig.data[:3]] == ["heatmap", "scatter", "heatmap"]


def test_a_loss_that_is_not_finite_is_a_mark_and_not_a_gap():
    loss = np.where(STEPS < 160, 2.0, np.inf)
    fig = cascade_figure(scene(steps={"step": STEPS, "loss": loss}), LIGHT, cascade())
    assert list(named(fig, "loss not finite")[0].x) == list(range(160, 200))
    assert paths(fig)[-1][3] == fig.layout.yaxis.domain[1]


def test_an_empty_run_shows_that_it_waits_for_the_first_step():
    steps = {"step": np.array([], int), "loss": np.array([])}
    stages = StageMap(np.array([], int), np.array([], int), np.empty((3, 0, 0), np.float32))
    fig = cascade_figure(scene(steps=steps, stages=stages), LIGHT)
    assert fig.layout.annotations[0].text == "Waiting for the first step."


def test_routing_spans_and_rolled_back_steps_are_drawn():
    old = SupersededSteps(0, np.arange(150, 170), np.full(20, 5.0), np.ones(20))
    fig = cascade_figure(
        scene(spans=[RoutingSpan(mode="on", start=170, end=190)], superseded=[old]), DARK, cascade()
    )
    assert any(s.type == "rect" and (s.x0, s.x1) == (169.5, 190.5) for s in fig.layout.shapes)
    (faint,) = named(fig, "loss, attempt 0")
    assert list(faint.x) == list(range(150, 170))


# -- marks on every time axis -----------------------------------------------------------------


def test_each_kind_of_mark_has_a_line_of_its_own_kind_and_only_in_view():
    steps = {"step": STEPS, "loss": np.ones(100), "grad_norm": np.ones(100)}
    steps |= {f"stage{i}_score": np.zeros(100) for i in (1, 2, 3)}
    given = [
        Mark(kind=k, step=s)
        for k, s in (("spike", 150), ("early_warning", 140), ("rollback", 155), ("fault", 20))
    ]
    fig = timeline(steps, [], [], LIGHT, marks=given)
    lines = {s.x0: (s.line.color, s.line.dash) for s in fig.layout.shapes if s.type == "line"}
    assert sorted(lines) == [140, 150, 155]
    assert len(set(lines.values())) == 3
    assert lines[150] == (LIGHT.spike, "dash")


# -- colours of scores ------------------------------------------------------------------------


def test_scores_keep_their_order_as_colours_and_noise_has_none():
    axis = robust_z(LIGHT, 1)
    z = z_shade(np.array([0, Z_MIN, 2 * Z_MIN, Z_MAX, 1000, np.inf]))
    assert z[0] < axis["cmin"]
    assert z[1] == pytest.approx(axis["cmin"])
    assert z[2] - z[1] == pytest.approx(np.log10(2))
    assert (z[3:] >= axis["cmax"] - 1e-9).all()
    assert np.isnan(z_shade(np.array([np.nan]))).all()
    assert np.isfinite(z).all()


def test_experts_colours_are_of_one_lightness_and_apart():
    for dark in (False, True):
        labs = np.array([oklab(c) for c in hues(12, dark)])
        assert np.ptp(labs[:, 0]) < 0.05
        gaps = np.linalg.norm(labs[:, None] - labs[None], axis=-1)[~np.eye(12, dtype=bool)]
        assert gaps.min() > 0.05
    assert hues(30, False)[13] == hues(30, False)[1]


# -- what is in a cell ------------------------------------------------------------------------


def test_the_usual_range_is_a_band_behind_its_own_strip():
    value = np.where(STEPS < 150, 4.0, 40.0)
    strips = [
        Strip("gate_amax", "", STEPS, value, (3.9, 4.1)),
        Strip("act_amax", "", STEPS, value, None),
    ]
    fig = small_multiples(strips, LIGHT, (100, 199), 150, "none")
    bands = [(s.yref, s.y0, s.y1) for s in fig.layout.shapes if s.type == "rect"]
    assert bands == [("y", 3.9, 4.1)]
    assert [t.name for t in fig.data] == ["gate_amax", "act_amax"]
    gone = [Strip("x", "", STEPS, np.full(100, np.nan), None)]
    assert (
        small_multiples(gone, LIGHT, (100, 199), None, "none").layout.annotations[0].text == "none"
    )


def test_maps_are_not_transposed_and_show_their_gain():
    m = np.array([[1.0, 0.5], [0.0, 1.0]])
    fig = residual_maps(
        [("before", [Tile("3.attn", np.eye(2))]), ("at the cell", [Tile("3.attn", m)])],
        LIGHT,
        "none",
    )
    assert fig.data[1].z[0][1] == 0.5
    assert fig.layout.yaxis2.autorange == "reversed"
    assert Tile("", m).gain == 1.5
    assert Tile("", m.T).gain == 1.5  # rows 1 and 1.5: the twin below tells them apart
    assert Tile("", np.array([[2.0, 0.0], [2.0, 0.0]])).gain == 2
    assert Tile("", np.array([[2.0, 0.0], [2.0, 0.0]]).T).gain == 4
    assert residual_maps([], LIGHT, "none here").layout.annotations[0].text == "none here"


def tokens(shift=0.0) -> list[Trajectory]:
    places = ("0.attn", "0.ffn", "1.attn", "1.ffn")
    return [
        Trajectory(
            token=t, place_P=places, projection_P2=np.arange(8.0).reshape(4, 2) + t + shift,
            expert_P=np.array([-1, 2, -1, 5]), flipped_P=np.array([np.nan, 0, np.nan, 0.5]),
        )
        for t in (3, 9)
    ]  # fmt: skip


def test_tokens_have_a_point_at_each_router_and_a_ring_at_each_flip():
    fig = trajectories(tokens(), tokens(-1), LIGHT, "none")
    beads = [t for t in fig.data if t.name == "tokens"]
    assert [t.xaxis for t in beads] == ["x", "x2"]
    assert list(beads[0].x) == ["0.ffn", "1.ffn"] * 2
    assert list(beads[0].y) == [5, 9, 11, 15]
    rings = list(beads[0].marker.line.width)
    assert rings == [0, 2.2, 0, 2.2]
    assert beads[0].marker.color[0] != beads[0].marker.color[1]
    assert beads[0].marker.color[0] == beads[0].marker.color[2]
    threads = [t for t in fig.data if t.mode == "lines" and t.xaxis == "x"]
    assert len(threads) == 2
    assert np.isnan(threads[0].y[4])  # one token is not joined with the next
    assert threads[0].y[0] == threads[1].y[0] - 1  # the faint ones are those from before
    assert trajectories([], [], LIGHT, "nobody").layout.annotations[0].text == "nobody"


def test_a_rolled_back_spike_is_marked_on_the_loss_of_its_attempt_and_has_no_end():
    from geodiag.dashboard.data.timeline_marks import spikes_from_events

    data = '{"kind": "spike", "onset": 150, "detected": 152, "peak": 153, "end": null}'
    over = '{"kind": "spike", "onset": 150, "detected": 152, "peak": 153, "end": 120}'
    rows = [
        {"kind": "spike", "step": 152, "attempt": 0, "message": "", "data": data},
        {"kind": "recovered", "step": 120, "attempt": 1, "message": "", "data": over},
    ]
    (spike,) = spikes_from_events(rows)
    assert (spike.end, spike.attempt) == (None, 0)
    steps = {"step": STEPS, "loss": np.full(100, 2.0), "grad_norm": np.ones(100)}
    steps |= {f"stage{i}_score": np.zeros(100) for i in (1, 2, 3)}
    old = SupersededSteps(0, np.arange(140, 160), np.full(20, 7.0), np.ones(20))
    marked = named(timeline(steps, [spike], [], LIGHT, superseded=[old]), "spike onset")[0]
    assert (list(marked.x), list(marked.y)) == ([150], [7.0])
    alone = named(timeline(steps, [spike], [], LIGHT), "spike onset")[0]
    assert list(alone.y) == [2.0]
