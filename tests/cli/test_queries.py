"""The query side of the command line: runs, show, routing, doctor. What people read and what
programs parse.
"""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest

from geodiag.cli import doctor
from geodiag.cli.output import prose
from geodiag.control import RequestWatch
from geodiag.events import Event
from geodiag.health import health, worst_of
from geodiag.metrics.schema import METRICS
from geodiag.run import Run, open_run


def record_maps(
    run: Run, fwd: float, bwd: float, residual: float, composite: float, steps: int = 5
) -> None:
    """Steps whose six residual maps have these worst row and column sums."""
    for step in range(steps):
        run.append("steps", {"step": [step], "loss": [2.0]})
        rows = {"layer": [0, 0, 1, 1, 2, 2], "site": ["attn", "ffn"] * 3}
        top = [1.0] * 5 + [composite if step == steps - 1 else 1.0]
        sums = {"amax_gain_fwd_max": fwd, "amax_gain_bwd_max": bwd, "sinkhorn_residual": residual}
        run.append(
            "layers",
            {"step": step, **rows, **sums, "composite_gain_fwd": 1.0, "composite_gain_bwd": top},
        )


# -- show ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fwd", "bwd", "residual", "composite", "words"),
    [
        (
            1.0,
            1.03,
            0.03,
            1.15,
            "stayed within the truncation error: ×1.15 at most, ×1.194 explained",
        ),
        (
            1.0,
            1.03,
            0.03,
            1.30,
            "grew to ×1.3 (backward, step 4, layer 2 ffn)",
        ),  # more than the truncation explains
        (
            1.2,
            1.30,
            0.30,
            4.00,
            "grew to ×4 (backward, step 4, layer 2 ffn)",
        ),  # not projected: its residual excuses nothing
        (1.0, 1.00, 0.00, math.inf, "composite gain is infinite"),
    ],
)
def test_show_prints_whether_the_composite_gain_grew(
    tmp_path, cli, fwd, bwd, residual, composite, words
) -> None:
    run = Run.create(tmp_path / "a")
    record_maps(run, fwd, bwd, residual, composite)
    run.close()
    out = cli("show", tmp_path / "a")
    assert out.exit_code == 0
    assert words in " ".join(out.output.split())


def test_show_reports_missing_residual_maps(tmp_path: Path, cli) -> None:
    run = Run.create(tmp_path / "plain", found={"missing": ["no hyper-connections here"]})
    run.append("steps", {"step": [0], "loss": [2.0]})
    run.close()
    out = cli("show", tmp_path / "plain")
    assert "this model has no hyper-connections" in " ".join(out.output.split())
    assert "no hyper-connections here" in out.output
    assert "Stage 1: local curvature nothing measured" in " ".join(out.output.split())


def test_show_json_has_the_worst_value_of_every_metric_with_its_place(
    make_run, cli, tmp_path: Path
) -> None:
    run = make_run(steps=5, close=False)
    flips = [0.0, 0.0, 0.0, 0.75, 0.0, 0.0]
    run.append(
        "layers",
        {"step": 5, "layer": [0, 0, 1, 1, 2, 2], "site": ["attn", "ffn"] * 3, "flip_rate": flips},
    )
    run.append("experts", {"step": 5, "layer": 1, "expert": [0, 1], "clamp_hits": [3, 400]})
    run.event(Event(step=4, kind="spike", message="the loss left its trend"))
    run.event(Event(step=4, kind="outlier", message="and came back"))
    run.close()
    shown = json.loads(cli("show", tmp_path / "run", "--json").output)
    assert shown["run"] == str(tmp_path / "run")
    assert (shown["status"], shown["last_step"], shown["spikes"]) == ("finished", 4, 1)
    assert shown["found"] == {"sites": 6, "routers": 3, "experts": 12}
    assert shown["worst"]["flip_rate"] == {"value": 0.75, "step": 5, "layer": 1, "site": "ffn"}
    assert shown["worst"]["clamp_hits"] == {
        "value": 400.0,
        "step": 5,
        "layer": 1,
        "site": None,
        "expert": 1,
    }
    assert shown["worst"]["loss"] == {"value": 3.0, "step": 0, "layer": None, "site": None}
    assert "lr" not in shown["worst"], "a metric without a bad end has no worst value"
    assert "grad_norm" not in shown["worst"], "what was never measured is absent, not zero"


def test_the_worst_value_follows_the_bad_side_skips_nulls_and_prefers_non_finite(
    tmp_path: Path,
) -> None:
    run = Run.create(tmp_path / "a")
    values = np.ma.masked_array([0.5, 0.1, 0.9, -5.0], mask=[False, False, False, True])
    run.append(
        "layers",
        {
            "step": range(4),
            "layer": 0,
            "site": "attn",
            "flip_rate": values,
            "router_entropy": values,
        },
    )
    rows = run.read_arrow("layers")
    high = worst_of(rows, METRICS["layers", "flip_rate"])
    low = worst_of(rows, METRICS["layers", "router_entropy"])
    assert (round(high.value, 3), high.step) == (0.9, 2)
    assert (round(low.value, 3), low.step) == (0.1, 1)
    assert worst_of(rows, METRICS["layers", "max_vio"]) is None
    run.append(
        "layers", {"step": [4, 5], "layer": 7, "site": "ffn", "flip_rate": [math.nan, math.inf]}
    )
    wild = health(run).worst["flip_rate"]
    assert (wild.step, wild.layer, wild.as_json()["value"], wild.as_json()["nonfinite"]) == (
        4,
        7,
        None,
        "nan",
    )


def test_health_does_not_depend_on_how_the_run_is_cut_into_chunks(
    tmp_path: Path, monkeypatch
) -> None:
    run = Run.create(tmp_path / "a")
    record_maps(run, 1.0, 1.03, 0.03, 1.15, steps=12)
    for step, flips, act in ((3, 0.9, 2.0), (7, 0.9, math.inf), (9, 0.1, 5.0), (11, 0.2, math.nan)):
        run.append(
            "layers",
            {"step": step, "layer": 7, "site": "ffn", "flip_rate": flips, "router_entropy": flips},
        )
        run.append("experts", {"step": step, "layer": 7, "expert": 1, "act_rms": act})
    whole = health(run)
    monkeypatch.setattr("geodiag.store.step_chunks.CELLS", 1)
    monkeypatch.setattr("geodiag.store.step_chunks.NEWEST_STEPS", 1)
    cut = health(run)
    assert cut.as_json() == whole.as_json()
    found = {n: cut.worst[n].step for n in ("flip_rate", "router_entropy", "act_rms")}
    assert found == {"flip_rate": 3, "router_entropy": 9, "act_rms": 7}, (
        "the first of equals, and of what is not finite"
    )
    assert cut.composite.verdict == "within"
    few = health(run, ["flip_rate"])
    assert few.worst == {"flip_rate": cut.worst["flip_rate"]}


def test_a_run_that_is_not_finite_from_the_first_step_is_shown(tmp_path: Path, cli) -> None:
    run = Run.create(tmp_path / "nan")
    run.append("steps", {"step": range(3), "loss": [math.nan] * 3, "stage3_score": [math.inf] * 3})
    run.append(
        "steps", {"step": [3], "loss": [math.nan], "stage1_score": [-0.0], "stage2_score": [0.1]}
    )
    run.append(
        "layers",
        {"step": range(3), "layer": 0, "site": "ffn", "act_amax": [1.0, math.nan, math.nan]},
    )
    run.close()
    out = cli("show", tmp_path / "nan")
    assert "Stage 1: local curvature  not finite from step 1 on" in out.output
    assert "Stage 2: routing instability  within its own history" in out.output
    assert "-0 robust z" not in out.output
    assert out.exit_code == 0
    assert "loss NaN" in out.output
    assert "outside its own history from step" in out.output
    json.loads(cli("show", tmp_path / "nan", "--json").output, parse_constant=pytest.fail)


def test_a_run_without_a_step_is_shown(tmp_path: Path, cli) -> None:
    Run.create(tmp_path / "empty").close()
    out = cli("show", tmp_path / "empty")
    assert (out.exit_code, "no step yet" in out.output) == (0, True)
    assert json.loads(cli("show", tmp_path / "empty", "--json").output)["last_step"] is None


def test_output_in_a_pipe_is_not_folded_and_on_a_terminal_between_words_only(
    make_run, cli, monkeypatch, tmp_path
):
    run, words = make_run(close=False), "it grew and grew " * 12
    run.append("layers", {"step": 9, "layer": 31, "site": "attn", "stream_amax": 70_000.0})
    run.event(Event(step=4, kind="spike", message=words))
    run.close()
    monkeypatch.setenv("COLUMNS", "40")
    out = cli("show", tmp_path / "run").output
    assert "≤ 65504" in out
    assert words.strip() in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    folded = str(prose(words, indent=2)).splitlines()
    assert len(folded) > 1
    assert all(len(line) <= 40 and line.startswith("  ") for line in folded)
    assert " ".join(folded).split() == words.split()
    path = "/runs/an-experiment-with-a-name-longer-than-a-line"
    assert path in str(prose(f"{path}: finished"))


def test_unreadable_layers_do_not_count_as_a_model_without_residual_maps(
    make_run, cli, tmp_path: Path
) -> None:
    make_run()
    for part in (tmp_path / "run/layers").rglob("*.parquet"):
        part.write_bytes(b"PAR1 and no more")
    shown = cli("show", tmp_path / "run").output
    assert "composite gain: the recorded residual maps could not be read" in shown
    assert "no hyper-connections" not in shown


# -- runs ----------------------------------------------------------------------------------


def test_runs_lists_every_run_also_a_broken_one(make_run, cli, tmp_path: Path) -> None:
    make_run("good")
    make_run("open", close=False)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/run.json").write_text('{"status": "fin')
    (tmp_path / "notes").mkdir()
    shown = {Path(r["run"]).name: r for r in json.loads(cli("runs", tmp_path, "--json").output)}
    assert {n: r["status"] for n, r in shown.items()} == {
        "good": "finished",
        "open": "running",
        "torn": "interrupted",
    }
    assert set(shown["good"]) >= {"run", "status", "last_step", "spikes", "worst", "found"}
    out = cli("runs", tmp_path)
    assert out.exit_code == 0
    assert "×1.005 at step 0" in out.output
    assert "torn: run.json: missing or unreadable" in out.output


# -- routing -------------------------------------------------------------------------------


def acknowledge(folder: Path, run: Run, stop: threading.Event, obeyed: bool) -> None:
    """Read the control file as a training does, and acknowledge its request."""
    watch = RequestWatch(folder)
    while not stop.wait(0.01):
        pending = watch.poll()
        if pending:
            data = {"request": pending.id, "routing": pending.routing, "obeyed": obeyed}
            message = f"{'obeyed' if obeyed else 'refused'}: routing {pending.routing}"
            run.event(Event(step=20, kind="acknowledge", message=message, data=data))
            return


def request(cli, folder: Path, run: Run, *args: object, obeyed: bool = True):
    """Run `geodiag routing` while a training reads its control file."""
    (folder / "control.json").unlink(missing_ok=True)
    stop = threading.Event()
    training = threading.Thread(target=acknowledge, args=(folder, run, stop, obeyed))
    training.start()
    try:
        return cli("routing", folder, *args, "--wait", 20)
    finally:
        stop.set()
        training.join()


def test_routing_prints_the_step_at_which_the_request_was_acknowledged(
    make_run, cli, tmp_path: Path
) -> None:
    run = make_run(close=False)
    shown = json.loads(request(cli, tmp_path / "run", run, "on", "--delay", 4, "--json").output)
    assert (shown["state"], shown["step"], shown["delay"], shown["asked"]) == (
        "obeyed",
        20,
        4,
        "on",
    )
    status = json.loads(cli("routing", tmp_path / "run", "status", "--json").output)
    assert (status["policy"], status["pending"], status["status"]) == ("on", None, "running")


def test_a_refused_request_is_an_error_and_changes_no_policy(make_run, cli, tmp_path: Path) -> None:
    run = make_run(close=False)
    assert request(cli, tmp_path / "run", run, "auto").exit_code == 0
    out = request(cli, tmp_path / "run", run, "on", obeyed=False)
    assert (out.exit_code, out.stderr) == (1, f"geodiag: {tmp_path}/run: refused: routing on\n")
    status = json.loads(cli("routing", tmp_path / "run", "status", "--json").output)
    assert (status["policy"], status["pending"]) == ("auto", None)


def test_a_request_that_is_not_acknowledged_in_time_stays_pending(
    make_run, cli, tmp_path: Path
) -> None:
    training = make_run(close=False)
    assert training.status() == open_run(tmp_path / "run").status() == "running"
    out = cli("routing", tmp_path / "run", "auto", "--wait", 0.2)
    assert out.exit_code == 0
    assert "not acknowledged after 0.2 s" in out.output
    assert (
        "requested auto, not acknowledged yet" in cli("routing", tmp_path / "run", "status").output
    )


def test_routing_status_explains_the_last_decision(make_run, cli, tmp_path: Path) -> None:
    run = make_run(close=False)
    run.event(Event(step=7, kind="decision", message="spike raised at step 7: on for 50 steps"))
    run.event(Event(step=8, kind="routing", message="off → warmup"))
    run.append("steps", {"step": [20], "routing_mode": ["on"], "routing_lag": [8]})
    run.close()
    out = " ".join(cli("routing", tmp_path / "run", "status").output.split())
    assert "finished, step 20" in out
    assert "routing on (experts chosen by the weights of 8 steps ago)" in out
    assert "last decision, step 7: spike raised at step 7: on for 50 steps" in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {},
            [
                "the period of this decision lasts until step 65",
                "possible from step 166 on (7 left)",
            ],
        ),
        ({"possible": None, "budget_left": 0}, ["no other intervention: the budget is used up"]),
        (
            {"acted": False},
            ["only recorded; geodiag routing RUN auto makes it act"],
        ),
    ],
)
def test_routing_status_prints_what_follows_and_when_the_next_decision_is_possible(
    make_run, cli, tmp_path, more, words
) -> None:
    run = make_run(close=False)
    data = {
        "acted": True,
        "actions": ["route"],
        "restore": 3,
        "until": 65,
        "possible": 166,
        "budget_left": 7,
    } | more
    run.event(
        Event(step=7, kind="decision", message="spike: back to the snapshot of step 3", data=data)
    )
    run.event(Event(step=3, kind="rollback", message="back from step 7 to step 3 in 0.10 s"))
    out = " ".join(cli("routing", tmp_path / "run").output.split())  # the default action is status
    assert "last rollback: back from step 7 to step 3 in 0.10 s" in out
    assert all(word in out for word in words)
    run.close()
    out = " ".join(cli("routing", tmp_path / "run", "status").output.split())
    assert "last rollback" in out
    assert not any(word in out for word in words), "nothing follows once the training is over"
    shown = json.loads(cli("routing", tmp_path / "run", "status", "--json").output)["last_decision"]
    assert shown == {"step": 7, "reason": "spike: back to the snapshot of step 3"} | data


def test_a_request_to_a_finished_training_is_refused(make_run, cli, tmp_path: Path) -> None:
    make_run()
    out = cli("routing", tmp_path / "run", "on")
    assert out.exit_code == 1
    assert "is finished, not running" in out.stderr
    assert not (tmp_path / "run/control.json").exists()


# -- doctor --------------------------------------------------------------------------------


def test_doctor_checks_each_part_of_the_machine(cli) -> None:
    shown = {c["name"]: c for c in json.loads(cli("doctor", "--json").output)}
    assert {
        "python",
        "torch",
        "gpu",
        "grouped matmul",
        "triton",
        "chromium",
        "disk",
        "cores",
        "versions",
    } <= {n.split(" ")[0] if n.startswith("gpu") else n for n in shown}
    assert shown["torch"]["state"] == "ok"
    assert cli("doctor").exit_code == 0


def test_doctor_compares_versions_without_the_build_tag(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\nnumpy==0.0.1\ngeodiag-no-such-package==1.0\n")
    check = doctor._pins(pins)
    assert check.state == "warn"
    assert "tested: 0.0.1" in check.found
    assert "no-such-package" not in check.found
    pins.write_text(f"numpy=={np.__version__.split('+')[0]}\n")
    assert doctor._pins(pins).state == "ok"
    assert doctor._pins(tmp_path / "absent.txt").state == "ok"


def test_doctor_names_the_fix_for_a_missing_browser_and_a_full_disk(
    monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._chromium().state == "warn"
    assert "apt-get install chromium" in doctor._chromium().fix
    monkeypatch.setattr(doctor, "FREE_GB", 1e12)
    assert doctor._disk(tmp_path).fix


def test_one_odd_step_does_not_put_a_stage_outside_its_history(tmp_path: Path) -> None:
    for name, scores, left in (
        ("odd", [1.0, 9.0, 9.0, 1.0, 9.0], None),
        ("left", [1.0, 9.0, 9.0, 9.0, 1.0], 1),
    ):
        run = Run.create(tmp_path / name)
        run.append("steps", {"step": range(5), "loss": [1.0] * 5, "stage2_score": scores})
        run.close()
        assert health(run).left == {1: None, 2: left, 3: None}


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["shwo"], "No such command 'shwo'"),
        (["train", "--size", "huge"], "'huge' is not one of 'tiny', 'small'"),
        (["train", "--steps", "0"], "greater than or equal to 1"),
        (["show"], "Missing argument 'RUN'"),
        (["routing", "run", "maybe"], "'maybe' is not one of 'auto', 'on', 'off', 'status'"),
        (["--nope"], "No such option: --nope"),
    ],
)
def test_a_mistyped_command_is_one_line_that_names_the_help(
    typed: list[str], words: str, cli
) -> None:
    out = cli(*typed)
    assert out.exit_code == 1
    assert words in out.stderr
    assert out.stderr.strip().endswith("--help")
    assert len(out.stderr.strip().splitlines()) == 1
