"""Data of the cascade page: spikes, window, cell, residual maps, tokens, usual ranges."""

import shutil

import numpy as np
import pytest
from plotly.graph_objects import Figure

from geodiag.cascade.explain import Cascade
from geodiag.dashboard.cascade import selection, verdict_card
from geodiag.dashboard.cascade.cell_series import cell_series
from geodiag.dashboard.cascade.selection import (
    LONGEST,
    StageCell,
    cascade_of,
    cell_of,
    chosen_step,
    scene_in,
    spikes_and_warnings,
    stages_of,
    window_of,
)
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.data.sparse_samples import composite_maps, samples_around, token_trajectories
from geodiag.dashboard.data.timeline_marks import marks_from_events
from geodiag.dashboard.figures.style import LIGHT
from geodiag.dashboard.pages import cascade as cascade_page
from geodiag.dashboard.pages.events import jump
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.url_state import View
from geodiag.events import Event
from geodiag.run import Run, open_run
from tests.dashboard import synthetic

FIGURES = (
    cascade_page.draw_picture,
    cascade_page.draw_series,
    cascade_page.draw_experts,
    cascade_page._maps,
    cascade_page._tokens,
)


@pytest.fixture(scope="module")
def spiked(runs) -> RunCache:
    """The run with a tear at step 360 that began in layer 3, expert 5."""
    cache = RunCache(open_run(runs / "mhc-tear"))
    cache.refresh()
    return cache


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory) -> RunCache:
    """A tear at step 300, a rollback to step 280, and a second attempt that goes well."""
    folder = tmp_path_factory.mktemp("rolled") / "back"
    bad = synthetic.RunScript(
        spikes=(synthetic.ScriptedSpike(onset=300, layer=2, expert=1),), steps=310
    )
    good = synthetic.RunScript(steps=400, seed=9)
    run = synthetic.create(folder, bad)
    synthetic.write_rows(run, bad, 0, 310)
    for event in bad.events():
        if event.step < 310:
            run.event(event)
    run.next_attempt()
    run.event(Event(step=280, kind="rollback", message="back to step 280"))
    run.event(Event(step=280, kind="attempt", message="training goes on from step 280"))
    synthetic.write_rows(run, good, 280, 400)
    run.close()
    cache = RunCache(open_run(folder))
    cache.refresh()
    return cache


def every_part(cache: RunCache, view: View) -> None:
    """Draws all that the page consists of; none of it may fail."""
    for draw in FIGURES:
        assert isinstance(draw(cache, view, LIGHT), Figure)
    for words in (
        cascade_page._verdict,
        cascade_page._evidence,
        cascade_page._where,
        verdict_card.spike_links,
    ):
        words(cache, view)
    cascade_page.layout(cache, view)


# -- what there is to choose -------------------------------------------------------------------


def test_spikes_and_warnings_can_be_chosen_and_the_newest_spike_is(spiked):
    assert [(c.step, c.kind) for c in spikes_and_warnings(spiked)] == [
        (351, "early_warning"),
        (360, "spike"),
    ]
    assert chosen_step(spiked, View()) == 360
    assert chosen_step(spiked, View(spike=351)) == 351


def test_the_cascade_of_the_chosen_spike_equals_explain(spiked):
    from geodiag.cascade.explain import explain

    found = cascade_of(spiked, 360)
    assert isinstance(found, Cascade)
    assert found == explain(spiked.run, 0)
    assert (found.stage, found.layer) == (1, 3)


def test_any_step_can_be_explained_and_an_unknown_step_is_one_line(spiked):
    found_by_step = cascade_of(spiked, 355)
    assert isinstance(found_by_step, Cascade)
    assert found_by_step.spike is None
    text = cascade_of(spiked, 10**6)
    assert isinstance(text, str)
    assert "599" in text
    assert "\n" not in text


def test_a_run_without_a_spike_offers_its_most_unusual_step(runs):
    cache = RunCache(open_run(runs / "hc-growing"))
    assert chosen_step(cache, View()) is None
    steps = cache.steps()
    best = max((float(np.nanmax(steps[f"stage{i}_score"])), i) for i in (1, 2, 3))
    step, stage, score = selection.most_unusual_step(cache)
    assert (score, stage) == best
    assert steps[f"stage{stage}_score"][steps["step"] == step] == score
    assert f"spike={step}" in str(verdict_card.spike_links(cache, View()))


# -- the window and the cell ---------------------------------------------------------------------


def test_the_window_begins_well_before_the_origin_and_holds_the_loss(spiked):
    found = cascade_of(spiked, 360)
    low, high = window_of(spiked, View(), found)
    assert low <= found.onset - 20
    assert high >= 380
    assert window_of(spiked, View(steps=(10, 50)), found) == (10, 50)
    assert window_of(spiked, View(), None) == (599 - 240, 599)


def test_a_very_wide_window_is_cut_around_the_spike():
    long = {"step": np.arange(20_000)}

    class Long:
        def steps(self):
            return long

    found = type("Found", (), {"spike_onset": 9000, "onset": 8990, "spike": None})()
    low, high = window_of(Long(), View(steps=(0, 19_999)), found)
    assert high - low == LONGEST
    assert low < 8990 < high
    assert window_of(Long(), View(steps=(0, 19_999)), None) == (19_999 - LONGEST, 19_999)


def test_the_cell_is_the_selected_one_else_the_origin_else_the_worst(spiked):
    found = cascade_of(spiked, 360)
    stages = stages_of(spiked, (320, 400))
    assert cell_of(View(stage=2, layer=4, step=370), found, stages) == StageCell(2, 4, 370)
    assert cell_of(View(), found, stages) == StageCell(1, 3, found.onset)
    stage, layer, step = cell_of(View(), None, stages)
    i, j = list(stages.layers).index(layer), list(stages.steps).index(step)
    assert stages.scores[stage - 1, i, j] == np.nanmax(stages.scores)


def test_an_address_carries_spike_and_cell():
    view = View(spike=360, stage=2, layer=4, step=370)
    assert View.parse(view.query_string()) == view
    assert View.parse("?stage=4&spike=-3") == View()


def test_a_click_on_a_map_is_a_cell_and_a_click_on_the_loss_is_none():
    view = View(spike=360)
    assert cascade_page._clicked(
        "", view, "cascade-picture", {"x": 366, "y": "4", "curveNumber": 1}
    ) == View(spike=360, stage=2, layer=4, step=366)
    assert (
        cascade_page._clicked("", view, "cascade-picture", {"x": 366, "y": 2.5, "curveNumber": 3})
        == view
    )
    assert cascade_page._clicked("", view, "cascade-picture", {"curveNumber": 0}) == view


# -- what is in a cell -----------------------------------------------------------------------------


def test_the_series_of_a_cell_belong_to_its_stage_and_the_most_unusual_come_first(spiked):
    from geodiag.anomaly.metric_roles import SIGNALS, STAGE_OF

    found = cascade_of(spiked, 360)
    for stage in (1, 2, 3):
        series = cell_series(spiked, StageCell(stage, 3, 362), (320, 400), found.onset)
        assert series
        assert {STAGE_OF[SIGNALS["layers", s.metric.name].part] for s in series} == {stage}
        assert [s.score for s in series] == sorted((s.score for s in series), reverse=True)
    odd = cell_series(spiked, StageCell(1, 3, 362), (320, 400), found.onset)[0]
    calm = cell_series(spiked, StageCell(1, 1, 362), (320, 400), found.onset)[0]
    assert odd.score > 5 * calm.score


def test_the_usual_range_is_computed_from_steps_before_the_cascade(spiked):
    found = cascade_of(spiked, 360)
    series = {
        s.metric.name: s
        for s in cell_series(spiked, StageCell(1, 3, 366), (320, 400), found.onset, most=20)
    }
    gate = series["gate_amax"]
    before = gate.value_S[(gate.step_S < found.onset) & (gate.step_S >= found.onset - 96)]
    assert gate.usual == pytest.approx(
        (np.quantile(before, 0.02), np.quantile(before, 0.98)), rel=1e-5
    )
    late = {
        s.metric.name: s
        for s in cell_series(spiked, StageCell(1, 3, 366), (320, 400), 366, most=20)
    }
    assert late["gate_amax"].usual[1] > 2 * gate.usual[1]  # the twin: it would swallow the rise


def test_a_composite_map_is_the_product_of_the_maps_in_the_order_of_the_sites(spiked):
    rows = spiked.run.read("matrices", steps=(350, 351))
    product = np.eye(4)
    for layer in range(4):
        for site in ("attn", "ffn"):
            cells = rows[(rows["layer"] == layer) & (rows["site"] == site) & (rows["map"] == "res")]
            product = (
                cells.pivot_table(index="i", columns="j", values="value").to_numpy(float) @ product
            )
    shown = dict(composite_maps(spiked, 3, 350))
    assert list(shown) == ["3.attn", "3.ffn", "0.attn → 3.ffn"]
    assert np.allclose(shown["0.attn → 3.ffn"], product, rtol=1e-6)
    assert not np.allclose(shown["0.attn → 3.ffn"], product.T, rtol=1e-3)


def test_samples_come_from_before_the_cascade_and_from_the_cell_or_just_after(spiked):
    assert samples_around(spiked, "matrices", 345, 347) == [("before", 300), ("at the cell", 350)]
    assert samples_around(spiked, "tokens", 345, 351) == [("before", 340), ("at the cell", 360)]
    assert samples_around(spiked, "matrices", 0, 0) == [("at the cell", 0)]
    assert samples_around(spiked, "matrices", 598, 599) == [("at the cell", 550)]
    assert samples_around(spiked, "domains", 345, 347) == []


def test_traced_tokens_keep_their_order_of_sites_and_their_flips(spiked):
    rows = spiked.run.read("tokens", steps=(360, 361))
    tokens = token_trajectories(spiked, 360)
    assert len(tokens) == rows["token"].nunique()
    first = tokens[0]
    assert first.place_P == tuple(
        f"{layer}.{site}" for layer in range(6) for site in ("attn", "ffn")
    )
    mine = rows[
        (rows["token"] == first.token) & (rows["layer"] == 4) & (rows["site"] == "ffn")
    ].iloc[0]
    at = first.place_P.index("4.ffn")
    assert first.expert_P[at] == mine["experts"][0]
    assert first.projection_P2[at].tolist() == [mine["projection_1"], mine["projection_2"]]
    assert first.flipped_P[at] == mine["flipped"] == 0.5
    assert first.expert_P[at - 1] == -1


# -- a living run
# --------------------------------------------------------------------------------------


def test_the_stage_map_of_a_live_run_is_not_recomputed_at_every_step(tmp_path, monkeypatch):
    script = synthetic.RunScript(steps=400, layers=3)
    run = synthetic.create(tmp_path / "r", script)
    synthetic.write_rows(run, script, 0, 300)
    cache = RunCache(open_run(tmp_path / "r"))
    worked: list[tuple] = []
    monkeypatch.setattr(selection, "stage_map", lambda r, a, b: worked.append((a, b)))
    for last in range(300, 340):
        synthetic.write_rows(run, script, last, last + 1)
        cache.refresh()
        stages_of(cache, window_of(cache, View(), None))
    assert 8 <= len(worked) <= 14
    before = len(worked)
    for last in range(340, 350):
        synthetic.write_rows(run, script, last, last + 1)
        cache.refresh()
        stages_of(cache, (100, 200))
    assert len(worked) == before + 1  # a window of the past is worked out once
    run.close()


def test_a_cascade_is_explained_again_only_when_new_steps_can_change_it(tmp_path, monkeypatch):
    script = synthetic.RunScript(
        steps=500, layers=3, spikes=(synthetic.ScriptedSpike(onset=300, layer=1, expert=2),)
    )
    run = synthetic.create(tmp_path / "r", script)
    synthetic.write_rows(run, script, 0, 303)
    for event in script.events():
        if event.step <= 302:
            run.event(event)
    cache = RunCache(open_run(tmp_path / "r"))
    explained: list[int] = []
    monkeypatch.setattr(selection, "explain", lambda r, s: explained.append(s))
    for last in range(303, 330):
        synthetic.write_rows(run, script, last, last + 1)
        cache.refresh()
        cascade_of(cache, 300)
        cascade_of(cache, 300)
    assert len(explained) == 6  # steps 303 to 308, which can still change the result
    run.close()


def test_the_page_can_be_drawn_at_every_moment_of_a_run(tmp_path):
    script = synthetic.RunScript(
        steps=60, layers=2, spikes=(synthetic.ScriptedSpike(onset=40, layer=1, expert=2),)
    )
    run = synthetic.create(tmp_path / "r", script)
    cache = RunCache(open_run(tmp_path / "r"))
    every_part(cache, View())
    for first in (0, 1, 5, 20, 41, 44):
        last = {0: 1, 1: 5, 5: 20, 20: 41, 41: 44, 44: 60}[first]
        synthetic.write_rows(run, script, first, last)
        for event in script.events():
            if first <= event.step < last:
                run.event(event)
        cache.refresh()
        every_part(cache, View())
    run.close()


# -- runs that lack something
# ------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["layers", "experts", "matrices", "tokens", "events", "steps"])
def test_a_run_that_lacks_a_table_is_shown_without_it(runs, tmp_path, gone):
    shutil.copytree(runs / "mhc-tear", tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / gone)
    cache = RunCache(open_run(tmp_path / "r"))
    every_part(cache, View())
    every_part(cache, View(spike=360, stage=1, layer=3, step=342))
    if gone == "layers":
        texts = [
            a.text
            for a in cascade_page.draw_picture(cache, View(spike=360), LIGHT).layout.annotations
        ]
        assert "Nothing of this stage was recorded here." in texts


def test_a_run_with_steps_alone_names_the_function_to_call(runs, tmp_path):
    shutil.copytree(runs / "mhc-tear", tmp_path / "r")
    for table in ("layers", "experts"):
        shutil.rmtree(tmp_path / "r" / table)
    cache = RunCache(open_run(tmp_path / "r"))
    every_part(cache, View())
    texts = [
        a.text for a in cascade_page.draw_picture(cache, View(spike=360), LIGHT).layout.annotations
    ]
    assert sum("call geodiag.attach" in t for t in texts) == 3


@pytest.mark.parametrize("name", ["plain", "empty", "hc-growing"])
@pytest.mark.parametrize("spike", [None, 0, 299, 10**6])
def test_every_run_and_every_step_gives_a_page(runs, name, spike):
    every_part(RunCache(open_run(runs / name)), View(spike=spike))


@pytest.mark.parametrize("onset", [0, 29])
def test_a_spike_at_the_first_or_the_last_step_is_shown(tmp_path, onset):
    script = synthetic.RunScript(steps=30, layers=2)
    run = synthetic.create(tmp_path / "r", script)
    synthetic.write_rows(run, script, 0, 30)
    data = {
        "kind": "nonfinite",
        "onset": onset,
        "detected": onset,
        "peak": onset,
        "end": None,
        "score": None,
    }
    run.event(Event(step=onset, kind="nonfinite", message="the loss is NaN", data=data))
    run.close()
    cache = RunCache(open_run(tmp_path / "r"))
    assert chosen_step(cache, View()) == onset
    every_part(cache, View())


def test_a_sparse_cadence_is_shown_as_wide_columns(tmp_path):
    script = synthetic.RunScript(steps=400, layers=2)
    run = synthetic.create(tmp_path / "r", script)
    for step in range(400):
        run.append("steps", script.steps_columns(np.arange(step, step + 1)))
    for step in range(0, 400, 10):
        run.append("layers", script.layers_columns(np.arange(step, step + 1)))
    run.close()
    fig = cascade_page.draw_picture(RunCache(open_run(tmp_path / "r")), View(), LIGHT)
    assert fig.data[0].dx == 10


# -- attempts
# ------------------------------------------------------------------------------------------


def test_a_rolled_back_spike_is_shown_with_the_steps_of_its_attempt(rolled_back):
    assert chosen_step(rolled_back, View()) == 300
    cache_then = selection.cache_of_spike(rolled_back, 300)
    assert cache_then is not rolled_back
    assert cache_then.steps()["step"][-1] == 309
    found = cascade_of(rolled_back, 300)
    assert (found.stage, found.layer) == (1, 2)
    scene = scene_in(cache_then, (270, 309), rolled_back)
    assert np.nanmax(scene.stages.scores[0, 2]) > 15
    assert (
        np.nanmax(stages_of(rolled_back, (270, 309)).scores[0, 2]) < 10
    )  # the twin: what took its place is calm
    assert [u.attempt for u in scene.superseded] == [1]
    every_part(rolled_back, View())


def test_rolled_back_steps_are_separate_from_the_steps_that_replaced_them(rolled_back):
    (old,) = rolled_back.superseded()
    assert (old.attempt, old.step_S[0], old.step_S[-1]) == (0, 280, 309)
    now = rolled_back.steps()
    both = np.isin(now["step"], old.step_S)
    assert not np.allclose(now["loss"][both], old.loss_S)
    past = rolled_back.as_of_attempt(0)
    assert np.array_equal(past.steps()["loss"][280:], old.loss_S)
    assert past.steps()["step"].tolist() == list(range(310))
    assert rolled_back.as_of_attempt(1) is rolled_back


def test_marks_are_spikes_warnings_rollbacks_and_later_attempts(rolled_back):
    from geodiag.dashboard.url.live_figures import event_marks

    assert [(m.step, m.kind) for m in event_marks(rolled_back)] == [
        (278, "fault"), (280, "rollback"), (280, "attempt"), (291, "early_warning"), (300, "spike"),
    ]  # fmt: skip
    first = {"kind": "attempt", "step": 0, "attempt": 0, "message": "training began", "data": None}
    assert marks_from_events([first], []) == []
    assert marks_from_events([first | {"attempt": 1}], []) != []


# -- words
# ---------------------------------------------------------------------------------------------


def test_a_spike_and_a_warning_link_to_their_cascade(spiked):
    by_kind = {e["kind"]: e for e in spiked.events()}
    assert jump(spiked, by_kind["spike"]) == "/run/mhc-tear/cascade?spike=360"
    assert jump(spiked, by_kind["early_warning"]) == "/run/mhc-tear/cascade?spike=351"
    event = {"step": 371, "kind": "cascade", "data": '{"spike_onset": 360, "onset": 351}'}
    assert jump(spiked, event) == "/run/mhc-tear/cascade?spike=360"
    assert jump(spiked, by_kind["decision"]) == "/run/mhc-tear/overview?steps=303-423&step=363"


def test_the_verdict_has_place_lead_confidence_and_suggested_fix(spiked):
    found = cascade_of(spiked, 360)
    text = str(cascade_page._verdict(spiked, View()))
    assert verdict_card.headline(found).startswith("Spike at step 360: ")
    for part in (
        "layer 3, ffn",
        f"{found.lead} steps",
        f"{found.confidence:.2f}",
        "SwiGLU clamping",
    ):
        assert part in text
    assert text.count("SwiGLU clamping") == 1


def test_the_evidence_has_units_and_places(spiked):
    found = cascade_of(spiked, 360)
    rows = verdict_card.evidence_rows(found)
    assert len(rows) == len(found.evidence)
    shares = [r for r in rows if r["metric"] == "clamp_gate_rate"]
    assert all(r["value"].endswith(" %") for r in shares)
    assert all(r["where"].startswith("layer 3 · ffn") for r in rows)
    assert all(r["help"] for r in rows)


def test_the_legend_explains_only_kinds_of_events_that_occur(runs, rolled_back):
    from geodiag.dashboard.components.frame import legend

    library = RunLibrary(runs)
    assert "early warning" in str(legend(library.get("mhc-tear"), "/run/mhc-tear/gain"))
    assert "rollback" not in str(legend(library.get("mhc-tear"), "/run/mhc-tear/gain"))
    assert legend(library.get("mhc-tear"), "/run/mhc-tear/events") == []
    assert legend(library.get("plain"), "/run/plain/gain") == []
    assert all(
        word in str(legend(rolled_back, "/run/back/gain"))
        for word in ("rollback", "rolled-back steps", "attempt")
    )


def test_an_earlier_attempt_reads_like_a_run_that_was_never_rolled_back(rolled_back, tmp_path):
    bad = synthetic.RunScript(
        spikes=(synthetic.ScriptedSpike(onset=300, layer=2, expert=1),), steps=310
    )
    alone: Run = synthetic.create(tmp_path / "r", bad)
    synthetic.write_rows(alone, bad, 0, 310)
    alone.close()
    for table in ("layers", "experts", "matrices", "tokens"):
        past, fresh = (
            rolled_back.as_of_attempt(0).run.read(table),
            open_run(tmp_path / "r").read(table),
        )
        assert len(past) == len(fresh)
        assert past["step"].tolist() == fresh["step"].tolist()
