"""`geodiag train`: the recorded run, also after Ctrl-C, kill -9, a rollback and a resume."""

import json
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geodiag.run import open_run
from tests.geodiag.store import kills

SMALL = ["--sequences", "2", "--steps", "4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def train(cli: Callable[..., Any], text: Path, tmp_path: Path) -> Callable[..., Any]:
    """`train("--steps", 3)`: a small training into tmp_path/run, in this process."""
    return lambda *args: cli("train", "--data", text, "--run", tmp_path / "run", *SMALL, *args)


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
def test_a_training_records_every_step_and_prints_its_health(
    train, tmp_path: Path, residual: str
) -> None:
    out = train("--residual", residual)
    assert out.exit_code == 0, out.output
    run = open_run(tmp_path / "run")
    assert run.status() == "finished"
    assert run.read("steps")["step"].tolist() == [0, 1, 2, 3]
    assert run.read("layers").groupby("step").size().tolist() == [12] * 4
    assert run.read("experts").groupby("step").size().tolist() == [48] * 4
    assert (
        run.read("steps")[["loss", "grad_norm", "lr", "tokens", "record_seconds"]]
        .iloc[1:]
        .notna()
        .all(axis=None)
    )
    assert run.read("layers")["amax_gain_fwd"].notna().all() == (residual != "plain")
    assert [line.split()[1] for line in out.stderr.splitlines() if line.startswith("step ")] == [
        f"{i}/4" for i in range(1, 5)
    ]
    assert "Stage 3: amplification" in out.stdout
    assert f"See it: geodiag dashboard {tmp_path / 'run'}" in out.stdout
    assert not [t for t in threading.enumerate() if t.name.startswith("geodiag")], (
        "no thread is left"
    )


def test_the_manifest_holds_all_settings(train, tmp_path: Path) -> None:
    train("--seed", 5, "--clamp", 0, "--inject", "lr-shock@2=3")
    config = open_run(tmp_path / "run").manifest["config"]
    assert config["options"]["seed"] == 5
    assert config["options"]["inject"] == ["lr-shock@2=3"]
    assert config["model"]["swiglu_limit"] is None
    assert config["train"]["steps"] == 4
    assert config["data"]["domains"]["prose"] > 10_000


def losses(run: Path) -> list[float]:
    return open_run(run).read("steps")["loss"].tolist()


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(train, tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        train("--seed", seed)
        found.append(losses(tmp_path / "run"))
        shutil.rmtree(tmp_path / "run")
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize(
    "how", [["--micro-batches", "2"], ["--recompute", "layers"], ["--every", "2"]]
)
def test_micro_batches_recomputation_and_cadence_do_not_change_the_losses(
    train, tmp_path: Path, how
) -> None:
    train()
    plain = losses(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "plain")
    assert train(*how).exit_code == 0
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=1e-5)
    if "--every" in how:
        assert open_run(tmp_path / "run").read("layers")["step"].unique().tolist() == [0, 2]
    else:
        columns = ["amax_gain_fwd", "stream_rms", "router_entropy"]
        a, b = (open_run(tmp_path / n).read("layers")[columns].to_numpy() for n in ("run", "plain"))
        assert a == pytest.approx(b, rel=1e-3, nan_ok=True)


def test_the_default_run_folder_is_named_by_size_residual_and_time(
    cli, text: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        cli(
            "train", "--data", text, "--sequences", 1, "--steps", 1, "--residual", "plain"
        ).exit_code
        == 0
    )
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("tiny-plain-20")


def test_a_fault_is_recorded_at_its_step_and_layer(train, tmp_path: Path) -> None:
    assert train("--inject", "expert-scale@2:3=5").exit_code == 0
    events = open_run(tmp_path / "run").read("events")
    (fault,) = events[events["kind"] == "fault"].to_dict("records")
    assert (fault["step"], fault["layer"]) == (2, 3)


@pytest.mark.parametrize("fault", ["expert-scale@0:2=1e39", "lr-shock@0=1e35"])
def test_a_loss_that_is_not_finite_is_an_event_and_loses_nothing(
    train, cli, tmp_path: Path, fault: str
) -> None:
    out = train("--inject", fault, "--steps", 5)
    assert out.exit_code == 0, out.output
    assert "not finite" in out.stderr
    run = open_run(tmp_path / "run")
    assert run.status() == "finished"
    steps = run.read("steps")
    assert steps["step"].tolist() == [0, 1, 2, 3, 4]
    first = 0 if fault.startswith("expert") else 1
    assert not steps["loss"].iloc[first:].apply(lambda x: x - x == 0).any(), (
        "NaN or infinite from there on"
    )
    kinds = run.read("events").groupby("kind")["step"].min()
    assert kinds["nonfinite"] == first
    assert run.read("layers").groupby("step").size().tolist() == [12] * 5
    shown = cli("show", tmp_path / "run", "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["last_step"] == 4


def test_an_enormous_learning_rate_does_not_stop_the_training(train, tmp_path: Path) -> None:
    assert train("--lr", "1e30").exit_code == 0
    assert open_run(tmp_path / "run").read("steps")["step"].tolist() == [0, 1, 2, 3]


# -- signals -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 2])
def test_ctrl_c_closes_the_run_as_interrupted_and_prints_what_is_kept(
    text: Path, tmp_path: Path, steps: int
) -> None:
    process = kills.start(tmp_path / "run", text)
    printed = kills.wait_for(process, steps)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, printed + rest
    assert "Traceback" not in printed + rest
    assert "Error" not in printed + rest
    run = open_run(tmp_path / "run")
    assert run.status() == "interrupted"
    if steps:
        assert run.manifest["status"] == "interrupted", (
            "written by the training itself, not inferred"
        )
        assert not list((tmp_path / "run/journal").glob("*.arrows")), "closed, not cut off"
    have = run.read("steps")["step"].tolist()
    assert have == list(range(len(have)))
    assert len(have) >= steps
    if have:
        assert f"interrupted after {len(have)} steps, which are kept" in rest


@pytest.mark.slow
def test_trainings_killed_at_random_moments_lose_no_finished_step(
    text: Path, tmp_path: Path
) -> None:
    rng = random.Random(3)
    found = [kills.kill_one(tmp_path / str(i), text, rng) for i in range(5)]
    assert [k.wrong for k in found] == [None] * 5
    assert sum(k.said for k in found) > 10


# -- rollback and resume -------------------------------------------------------------------


def test_a_resumed_training_has_the_losses_of_an_uninterrupted_one(
    cli, train, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geodiag.reference_models.train import Trainer

    options = [
        "--steps",
        7,
        "--rollback",
        "disk",
        "--snapshot-every",
        2,
        "--inject",
        "expert-scale@5",
    ]
    assert train(*options, "--run", tmp_path / "whole").exit_code == 0
    update = Trainer.update

    def stop(self: Trainer) -> Any:
        if self.steps_done == 5:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(Trainer, "update", stop)
    assert train(*options).exit_code == 130
    monkeypatch.setattr(Trainer, "update", update)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")[:5]
    done = cli("train", "--resume", tmp_path / "run")
    assert done.exit_code == 0, done.output
    run = open_run(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert run.read("steps")["attempt"].tolist() == [0] * 4 + [1] * 3
    faults = run.read("events").query("kind == 'fault'")
    assert faults["attempt"].tolist() == [0, 1], "faults after the snapshot are planted again"


def test_a_finished_training_can_be_resumed_with_more_steps(cli, train, tmp_path: Path) -> None:
    train("--rollback", "disk")
    done = cli("train", "--resume", tmp_path / "run", "--steps", 6)
    assert done.exit_code == 0, done.output
    steps = open_run(tmp_path / "run").read("steps")
    assert steps["step"].tolist() == list(range(6))
    assert steps["attempt"].tolist() == [0] * 4 + [1] * 2, "the last step always has a snapshot"


def test_a_run_that_cannot_be_resumed_is_refused_with_the_fix(
    cli, train, make_run, tmp_path: Path
) -> None:
    assert train().exit_code == 0
    make_run("other")
    (tmp_path / "run/snapshots/rank-0").mkdir(parents=True)
    for args, words in {
        ("--resume", tmp_path / "absent"): "pass a run directory",
        ("--resume", tmp_path / "other"): "is no run of geodiag train",
        (
            "--resume",
            tmp_path / "run",
        ): "holds no snapshots; only a training with --rollback disk can be resumed",
        ("--resume", tmp_path / "run", "--seed", 3): "holds no snapshots",
    }.items():
        out = cli("train", *args)
        assert (out.exit_code, out.stderr.count("\n")) == (1, 1)
        assert words in out.stderr
    (tmp_path / "run/snapshots/rank-0/step-00000002").mkdir()
    out = cli("train", "--resume", tmp_path / "run", "--seed", 3)
    assert "a resumed training keeps its --seed; leave that out" in out.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--actions", "rollback"],
            "the action rollback needs snapshots; pass --rollback memory or disk",
        ),
        (["--actions", "pray"], "there is no action 'pray'"),
        (["--on", "monday"], "cannot act on 'monday'"),
        (["--rollback", "memory", "--snapshot-bytes", "1000"], "the budget in memory is 0.001 MB"),
    ],
)
def test_an_invalid_policy_is_one_line(train, tmp_path: Path, options: list, words: str) -> None:
    out = train(*options)
    assert (out.exit_code, out.stderr.count("\n")) == (1, 1)
    assert words in out.stderr
    assert not (tmp_path / "run").exists()


def test_a_lost_doubled_or_incomplete_step_is_found(make_run, tmp_path: Path) -> None:
    make_run("whole", steps=6, layers=6)
    assert kills.judge(tmp_path / "whole", 6).wrong is None
    assert kills.judge(tmp_path / "whole", 5).wrong is None, "the step in flight may be there"
    assert "and 7 were done" in (kills.judge(tmp_path / "whole", 7).wrong or "")
    assert "and 4 were done" in (kills.judge(tmp_path / "whole", 4).wrong or "")
    make_run("thin", steps=6, layers=5)
    assert "rows of layers" in (kills.judge(tmp_path / "thin", 6).wrong or "")
    run = make_run("twice", steps=6, layers=6, close=False)
    run.append("steps", {"step": [5], "loss": [1.0]})
    run.close()
    assert "not every one once" in (kills.judge(tmp_path / "twice", 6).wrong or "")
