"""Reports and comparisons as data and as files: known numbers, unusual runs, escaped names."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from dash import dcc, html

from geodiag.dashboard.components.basic import tip
from geodiag.dashboard.figures.run_overlay import Panel, Track, overlay, stroke
from geodiag.dashboard.figures.style import DARK, LIGHT
from geodiag.dashboard.reports.comparison import better, compare
from geodiag.dashboard.reports.figure import differences, light_and_dark
from geodiag.dashboard.reports.run_labels import labels_of
from geodiag.dashboard.reports.static_html import render
from geodiag.errors import GeodiagError
from geodiag.events import Event
from geodiag.run import Run, open_run

EVIL = "<img src=x onerror=alert(1)>'\"</script><script>alert(2)</script>"


def write_run(
    path: Path, steps: int, level: float, gain: float, spike: int | None = None, **create: Any
) -> Run:
    """A closed run whose loss is `level` throughout, and whose composite gain is `gain` at the last
    step, else 1.
    """
    run = Run.create(path, found={"sites": 2, "routers": 1, "experts": 4, "layers": 1}, **create)
    step_S = np.arange(steps)
    run.append(
        "steps", {"step": step_S, "loss": np.full(steps, level), "tokens": np.full(steps, 100.0)}
    )
    gains = np.where(np.repeat(step_S, 2) == steps - 1, gain, 1.0)
    where = {"layer": 0, "site": ["attn", "ffn"] * steps}
    run.append("layers", {"step": np.repeat(step_S, 2), **where, "composite_gain_fwd": gains})
    if spike is not None:
        data = {
            "kind": "spike",
            "detected": spike + 2,
            "onset": spike,
            "peak": spike + 1,
            "end": spike + 5,
            "score": 9,
        }
        run.event(Event(step=spike + 2, kind="spike", message="the loss left its trend", data=data))
    run.close()
    return run


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    write_run(
        tmp_path / "a",
        20,
        3.0,
        1.5,
        spike=10,
        config={"model": {"layers": 1, "wide": 8}, "seed": 0},
    )
    write_run(tmp_path / "b", 80, 2.5, 4.0, config={"model": {"layers": 1}, "seed": 1})
    return tmp_path / "a", tmp_path / "b"


class PageElements(HTMLParser):
    """The elements of a file, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def data_of(text: str) -> dict[str, Any]:
    """What the page's script draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found.group(1))


# -- output --------------------------------------------------------------------------


def test_compare_json_has_the_known_numbers_of_both_runs(pair, cli) -> None:
    output = json.loads(cli("compare", *pair, "--json").output)
    assert list(output) == ["runs", "shared", "metrics", "differences"]
    assert [r["label"] for r in output["runs"]] == ["a", "b"]
    assert [r["last_step"] for r in output["runs"]] == [19, 79]
    assert [r["tokens"] for r in output["runs"]] == [2000, 8000]
    assert output["shared"] == {"last_step": 19, "steps": 20, "loss": [3.0, 2.5]}
    (spike,) = output["runs"][0]["spikes"]
    assert {
        k: spike[k] for k in ("kind", "onset", "detected", "peak", "end", "score", "attempt")
    } == {
        "kind": "spike",
        "onset": 10,
        "detected": 12,
        "peak": 11,
        "end": 15,
        "score": 9.0,
        "attempt": 0,
    }
    assert "No internal precursor" in spike["words"]
    assert output["runs"][1]["spikes"] == []
    gain = output["metrics"]["composite_gain_fwd"]
    assert gain["worst"] == [
        {"value": 1.5, "step": 19, "layer": 0, "site": "attn"},
        {"value": 4.0, "step": 79, "layer": 0, "site": "attn"},
    ]
    assert (gain["last"], gain["unit"], gain["worse"]) == ([1.5, 4.0], "×", "high")
    assert gain["better"] == {"worst": [0], "last": [0]}
    assert output["metrics"]["loss"]["better"] == {"worst": [], "last": [1]}
    assert output["differences"] == {"model.wide": [8, None], "seed": [0, 1]}


def test_report_json_equals_show_json_and_adds_the_cascades(runs, cli) -> None:
    output = json.loads(cli("report", runs / "mhc-tear", "--json").output)
    shown = json.loads(cli("show", runs / "mhc-tear", "--json").output)
    assert {
        k: output[k] for k in ("run", "status", "last_step", "loss", "stages", "composite", "found")
    } == {
        k: shown[k] for k in ("run", "status", "last_step", "loss", "stages", "composite", "found")
    }
    assert output["worst"].items() <= shown["worst"].items()
    assert output["cascades"] == json.loads(cli("cascade", runs / "mhc-tear", "--json").output)
    assert (output["name"], output["untold"], output["config"]["residual"]) == (
        "mhc-tear",
        0,
        "mhc",
    )


def test_json_writes_a_page_only_if_requested(pair, cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli("compare", *pair, "--json")
    cli("report", pair[0], "--json")
    assert list(tmp_path.glob("*.html")) == []
    assert json.loads(cli("report", pair[0], "--json", "--out", "x.html").output)["name"] == "a"
    assert (tmp_path / "x.html").exists()


def test_the_terminal_output_names_the_results_and_the_file(
    pair, cli, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = cli("compare", *pair)
    assert out.exit_code == 0, out.output
    assert "wrote compare-a-b.html (" in out.output
    assert "2 settings differ: model.wide, seed" in out.output
    assert "mean of the 20 newest steps that all runs have, up to step 19" in out.output
    assert "wrote report-a.html (" in cli("report", pair[0]).output
    (tmp_path / "there").mkdir()
    assert "wrote there/report-b.html" in cli("report", pair[1], "--out", "there").output


def test_a_run_is_marked_as_better_only_by_a_visible_difference() -> None:
    assert better("flip_rate", [0.2, 0.1, None]) == [1]
    assert better("router_entropy", [1.0, 2.0]) == [1], "a low entropy is the bad end"
    assert better("flip_rate", [0.1, 0.10000001]) == []
    assert better("flip_rate", [0.1, None]) == [], "alone, nothing is better"
    assert better("loss", [float("nan"), 7.0]) == [1]
    assert better("loss", [float("nan"), float("inf")]) == []
    assert better("flip_rate", [0.1, 0.3, 0.1]) == [0, 2]


# -- files ---------------------------------------------------------------------------------


def test_a_page_fetches_nothing_and_contains_the_charting_library_once(pair, cli, tmp_path) -> None:
    cli("report", pair[0], "--out", tmp_path / "r.html")
    cli("compare", *pair, "--out", tmp_path / "c.html")
    for name in ("r.html", "c.html"):
        text = (tmp_path / name).read_text()
        seen = PageElements(text)
        links = [
            a
            for _, a in seen.tags
            for k in ("src", "href")
            if (v := a.get(k)) and not v.startswith(("#", "data:"))
        ]
        assert links == []
        policy = next(a["content"] for t, a in seen.tags if t == "meta" and a.get("http-equiv"))
        assert policy is not None
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert text.count("plotly.js v") == 1
        assert len([t for t, _ in seen.tags if t == "script"]) == 3


def test_every_text_of_a_run_is_escaped(tmp_path, cli) -> None:
    folder = tmp_path / "<b onclick=alert(3)>&amp; <"
    script = write_run(folder, 30, 2.0, 1.2, spike=20, config={EVIL: EVIL, "list": [EVIL]})
    run = Run.create(
        folder, found={"family": EVIL, "missing": [EVIL], EVIL: 1}, config={EVIL: EVIL}
    )
    run.append("steps", {"step": [30], "loss": [2.0]})
    run.event(Event(step=30, kind="problem", message=EVIL, site=EVIL))
    run.close()
    other = write_run(tmp_path / "other", 30, 2.0, 1.2)
    plain = PageElements(_page(cli, tmp_path, "report", other.url))
    for command, runs in (("report", [script.url]), ("compare", [script.url, other.url])):
        seen = PageElements(_page(cli, tmp_path, command, *runs))
        assert [t for t, _ in seen.tags if t in ("script", "b")].count("script") == 3
        assert [a for _, a in seen.tags if any(k.startswith("on") for k in a)] == []
        assert [a["src"][:5] for t, a in seen.tags if t == "img" and a["src"]] == ["data:"], (
            "only the brand's own sign"
        )
    assert len([t for t, _ in plain.tags if t == "script"]) == 3


def _page(cli, folder: Path, *args: str) -> str:
    out = cli(*args, "--out", folder / "page.html")
    assert out.exit_code == 0, out.output
    return (folder / "page.html").read_text()


def test_a_component_becomes_html_and_text_in_it_is_escaped() -> None:
    part = html.Div(
        ["a < b", html.Img(src="x", alt=""), None],
        className="c",
        style={"minHeight": 3},
        tabIndex=0,
    )
    assert (
        render(part)
        == '<div class="c" style="min-height:3px" tabindex="0">a &lt; b<img alt="" src="x"></div>'
    )
    assert render(tip(html.B("x", className="y"), 'say "hi"')) == (
        '<b tabindex="0" class="y tipped" data-tip="say &quot;hi&quot;">x</b>'
    )
    assert render(dcc.Link("there", href="/run/x")) == "<span>there</span>"
    with pytest.raises(TypeError, match="Graph is drawn by a script"):
        render(dcc.Graph())


def test_the_dark_figure_is_the_light_one_and_its_changes() -> None:
    def make(theme):
        x = np.arange(3000)
        return overlay(
            [Track("a", x, x)], [Panel("loss", "", [np.sin(x / 50).astype(np.float32)], 100)], theme
        )

    made = light_and_dark(make)
    figure = json.loads(json.dumps(made["figure"]))
    for path, value in made["dark"]:
        at = figure
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
    dark = json.loads(make(DARK).to_json())
    dark["layout"].pop("template")
    assert figure == dark
    assert "bdata" not in json.dumps(made["dark"]), "the data are there once"
    assert differences({"a": [1, 2]}, {"a": [1, 2]}) == []
    assert differences([{"a": 1}], [{"a": 1}, {}]) == [([], [{"a": 1}, {}])]


def test_twelve_runs_have_twelve_strokes() -> None:
    for theme in (LIGHT, DARK):
        assert len({stroke(i, theme) for i in range(12)}) == 12


# -- odd runs ------------------------------------------------------------------------------


def test_runs_with_the_same_folder_name_get_different_labels(tmp_path) -> None:
    for place in ("x/day/run", "y/day/run", "y/run", "z"):
        write_run(tmp_path / place, 3, 2.0, 1.0)
    runs = [open_run(tmp_path / p) for p in ("x/day/run", "y/day/run", "y/run", "z")]
    assert labels_of(runs) == ["x/day/run", "y/day/run", "y/run", "z"]


def test_mistakes_are_one_line_that_names_the_fix(pair, cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for args, words in (
        (["compare", "a"], "compare needs two runs or more; for one run: geodiag report RUN"),
        (["compare", "a", "./a/"], "is given 2 times; pass different runs"),
        (["compare", "a", "nowhere"], "nowhere does not exist; pass a run directory"),
        (["compare", "a", "."], "is a folder of runs; pass a run directory, e.g."),
        (["report", "nowhere"], "nowhere does not exist; pass a run directory"),
        (["report", "a", "--out", "no/where.html"], "cannot write no/where.html"),
        (["compare", *"ababababababa"], "13 lines cannot be distinguished; pass at most 12 runs"),
    ):
        out = cli(*args)
        assert out.exit_code == 1, args
        output = out.stderr.strip().splitlines()
        assert len(output) == 1
        assert words in output[0]


@pytest.mark.parametrize("without", ["steps", "layers", "events", "run.json", "everything"])
def test_incomplete_runs_are_reported_and_compared(pair, cli, tmp_path, without) -> None:
    import shutil

    whole, poor = pair[1], pair[0]
    for piece in (
        ("steps", "layers", "events", "run.json") if without == "everything" else [without]
    ):
        if (poor / piece).is_dir():
            shutil.rmtree(poor / piece)
        elif piece != "run.json" or without != "everything":
            (poor / piece).unlink(missing_ok=True)
    assert cli("report", poor, "--out", tmp_path / "r.html").exit_code == 0
    out = cli("compare", poor, whole, "--json")
    assert out.exit_code == 0, out.output
    output = json.loads(out.output)
    if without in ("steps", "everything"):
        assert output["runs"][0]["last_step"] is None
        assert output["shared"]["loss"] == [None, 2.5], (
            "a run without a loss does not take it from the others"
        )
    assert cli("compare", poor, whole, "--out", tmp_path / "c.html").exit_code == 0


def test_a_run_of_a_newer_geodiag_is_named_on_the_page(pair, cli, tmp_path) -> None:
    manifest = json.loads((pair[0] / "run.json").read_text()) | {"schema_version": 99}
    (pair[0] / "run.json").write_text(json.dumps(manifest))
    assert "upgrade geodiag" in cli("report", pair[0], "--out", tmp_path / "r.html").output
    assert "upgrade geodiag" in (tmp_path / "r.html").read_text()
    assert "upgrade geodiag" in cli("compare", *pair, "--out", tmp_path / "c.html").output
    assert "upgrade geodiag" in (tmp_path / "c.html").read_text()


def test_a_running_training_is_reported_up_to_its_newest_step(tmp_path, cli) -> None:
    run = Run.create(tmp_path / "now")
    run.append("steps", {"step": [0, 1, 2], "loss": [3.0, 2.0, 1.0]})
    run.heartbeat(2)
    output = json.loads(cli("report", tmp_path / "now", "--json").output)
    assert (output["status"], output["last_step"], output["loss"]) == ("running", 2, 1.0)
    run.close()


def test_the_newest_attempt_is_compared_and_a_spike_that_was_rolled_back_is_kept(tmp_path) -> None:
    run = Run.create(tmp_path / "r")
    run.append("steps", {"step": range(20), "loss": [2.0] * 15 + [9.0] * 5})
    data = {"kind": "spike", "detected": 16, "onset": 15, "peak": 16, "end": None, "score": 30}
    run.event(Event(step=16, kind="spike", message="the loss left its trend", data=data))
    run.next_attempt()
    run.append("steps", {"step": range(12, 30), "loss": [2.0] * 18})
    run.close()
    write_run(tmp_path / "calm", 30, 2.0, 1.0)
    compared = compare([open_run(tmp_path / "r"), open_run(tmp_path / "calm")])
    assert compared.shared()["loss"] == [2.0, 2.0]
    from geodiag.dashboard.reports.comparison_page import draw_losses

    rings = [t for t in draw_losses(compared, LIGHT).data if t.marker.symbol == "circle-open"]
    assert [(list(t.x), list(t.y)) for t in rings] == [([15.0], [9.0])], (
        "where its own attempt had it"
    )


def test_ranks_are_one_run(tmp_path, cli) -> None:
    ranks = [Run.create(tmp_path / "two", rank=r, world_size=2, attempt=0) for r in (0, 1)]
    for run, loss in zip(ranks, (2.0, 4.0), strict=True):
        run.append("steps", {"step": range(10), "loss": [loss] * 10, "tokens": [50.0] * 10})
    for run in reversed(ranks):
        run.close()
    write_run(tmp_path / "one", 10, 3.5, 1.0)
    output = json.loads(cli("compare", tmp_path / "two", tmp_path / "one", "--json").output)
    assert output["shared"]["loss"] == [3.0, 3.5]
    assert [r["tokens"] for r in output["runs"]] == [1000, 1000]


def test_a_url_is_read_like_a_folder(pair, cli, tmp_path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(pair[0]), "/far/a", recursive=True)
    try:
        assert cli("report", "memory://far/a", "--out", tmp_path / "r.html").exit_code == 0
        output = json.loads(cli("compare", "memory://far/a", *pair, "--json").output)
        assert len({r["label"] for r in output["runs"]}) == 3
    finally:
        memory.rm("/far", recursive=True)


def test_tokens_are_an_axis_only_if_every_step_has_their_number(pair, tmp_path) -> None:
    from geodiag.dashboard.reports.comparison_page import draw_losses_over_tokens

    silent = Run.create(tmp_path / "silent")
    silent.append("steps", {"step": range(5), "loss": [1.0] * 5})
    silent.close()
    compared = compare([open_run(p) for p in (*pair, tmp_path / "silent")])
    shown = [t for t in draw_losses_over_tokens(compared, LIGHT).data if len(t.x)]
    assert [t.name for t in shown] == ["a", "b"]
    assert [float(t.x[-1]) for t in shown] == [2000, 8000]
    with pytest.raises(GeodiagError, match="two runs or more"):
        compare([])
