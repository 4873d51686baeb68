"""Two ranks over gloo: what they record, how alike they decide, and how they end when one of them
fails.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import geodiag
from geodiag.cli.torchrun import RankInfo
from geodiag.hooks.distributed.rank_exchange import Ranks
from geodiag.hooks.distributed.rank_messages import RankMessage, RankMessages
from geodiag.run import Run
from tests.hooks import small
from tests.hooks.distributed import scenarios
from tests.hooks.distributed.launch import Rank, ranks

PEACEFUL = (
    *(
        "record:ddp",
        "unwatched:ddp",
        "record:fsdp",
        "unwatched:fsdp",
        "asked:ddp",
        "asked:fsdp",
        "one_nan:ddp",
    ),
    *(
        "broken_inside:ddp",
        "broken_inside:fsdp",
        "broken_probe:ddp",
        "broken_probe:fsdp",
        "apart:ddp",
    ),
    *("refused:folder", "refused:model", "refused:snapshots"),
    *("resumed:ddp-newest", "resumed:fsdp-newest", "resumed:ddp-damaged", "resumed:ddp-all"),
)
LOCAL = (
    "data_shift",
    "expert_norm_max_median",
    "expert_norm_min_median",
    "router_margin_p01",
    "router_margin_p10",
    "act_rms",
)
"""Of one rank's own tokens (a quantile, a ratio, a distance): the mean over ranks is not that of
the whole batch.
"""
SKIPPED = ("rank", "attempt", "step_seconds", "record_seconds", "probe_seconds")


PROBE_TOKENS = small.SEQUENCES * small.SEQUENCE
OF_ONE_TOKEN = {
    "flip_rate": 1.01 / PROBE_TOKENS,
    "flip_top1": 1.01 / PROBE_TOKENS,
    "flip_any": 1.01 / PROBE_TOKENS,
    "tear": 2 / PROBE_TOKENS,
    "tear_flipped": 2.0,
}
"""What one token more or less that flips may change: a share of the tokens; a jump between two
outputs is rarely more than twice as long as one.
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Rank]]:
    """All scenarios in which no rank dies, one after the other in one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, ranks(folder, *PEACEFUL, seconds=290)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Rank]]:
    folder = tmp_path_factory.mktemp("steered")
    return folder, ranks(folder, "steer:ddp", "steer:fsdp", seconds=290)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in one process, on whole batches."""
    folder = tmp_path_factory.mktemp("alone")
    scenarios.record(folder, "alone")
    return folder


def both(results: tuple[Path, list[Rank]], name: str) -> list[Any]:
    _, (first, second) = results
    assert (first.code, second.code) == (0, 0), first.heard + second.heard
    return [first.said[name], second.said[name]]


def run_of(results: tuple[Path, list[Rank]], name: str) -> Run:
    return geodiag.open_run(results[0] / name / "run")


# -- what is recorded ------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_to_the_bit_as_without_geodiag(
    together: tuple[Path, list[Rank]], parallel: str
) -> None:
    for watched, bare in zip(
        both(together, f"record:{parallel}"), both(together, f"unwatched:{parallel}"), strict=True
    ):
        assert watched["losses"] == bare["losses"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("table", ["steps", "layers", "experts", "matrices"])
def test_merged_ranks_read_as_one_process_would_have_recorded(
    together: tuple[Path, list[Rank]], alone: Path, parallel: str, table: str
) -> None:
    one = _by_place(geodiag.open_run(alone / "run").read(table))
    two = _by_place(run_of(together, f"record:{parallel}").read(table, ranks="merged"))
    assert len(one) == len(two)
    compared = 0
    for name in one.columns.difference([*SKIPPED, *LOCAL]):
        if one[name].dtype != np.float32 or one[name].isna().all():
            continue
        assert (one[name].isna() == two[name].isna()).all(), name
        apart, size = (one[name] - two[name]).abs(), one[name].abs().max()
        if name in OF_ONE_TOKEN:
            # The ranks add up in another order. A token whose margin is as small as that rounding
            # may flip in one of the two trainings only: one token, at one place.
            assert (apart > 0.01 * size + 1e-7).sum() <= 1, (name, apart.max())
            assert not apart.max() > OF_ONE_TOKEN[name], (name, apart.max())
        else:
            assert apart.max() <= 0.01 * size + 1e-7, (name, apart.max(), size)
        compared += 1
    assert compared >= {"steps": 3, "layers": 30, "experts": 3, "matrices": 1}[table]


def _by_place(rows: pd.DataFrame) -> pd.DataFrame:
    keys = [k for k in ("step", "layer", "site", "expert", "map", "i", "j") if k in rows]
    return rows.sort_values(keys).reset_index(drop=True)


def test_one_rank_alone_does_not_read_as_the_whole(
    together: tuple[Path, list[Rank]], alone: Path
) -> None:
    one = geodiag.open_run(alone / "run").read("steps")
    each = run_of(together, "record:ddp").read("steps")
    for rank in (0, 1):
        mine = each[each["rank"] == rank].reset_index(drop=True)
        assert (mine["loss"] - one["loss"]).abs().max() > 1e-3
        assert (mine["tokens"] * 2 == one["tokens"]).all()


def test_shards_of_a_gradient_are_not_its_norm(together: tuple[Path, list[Rank]]) -> None:
    """The layers' norms of sharded weights are the whole's, on every rank's own rows."""
    rows = {p: run_of(together, f"record:{p}").read("layers") for p in ("ddp", "fsdp")}
    for rank in (0, 1):
        whole, sharded = (
            rows[p][rows[p]["rank"] == rank]["grad_norm"].dropna().to_numpy()
            for p in ("ddp", "fsdp")
        )
        assert np.allclose(whole, sharded, rtol=5e-3)
        assert not np.allclose(whole, sharded / np.sqrt(2), rtol=5e-3)


def test_what_all_ranks_know_is_written_down_once(together: tuple[Path, list[Rank]]) -> None:
    events = run_of(together, "asked:ddp").read("events")
    assert set(events["rank"]) == {0}
    assert (events["kind"] == "request").sum() == 2


# -- alike -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_ranks_obey_one_request_at_the_same_step(
    together: tuple[Path, list[Rank]], parallel: str
) -> None:
    first, second = both(together, f"asked:{parallel}")
    assert first == second
    modes = dict(first["modes"])
    assert [modes[s] for s in (2, 3, 5, 9, 10, 12)] == ["off", "warmup", "on", "on", "drain", "off"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_ranks_spike_takes_all_ranks_back_to_the_same_snapshot(
    steered: tuple[Path, list[Rank]], parallel: str
) -> None:
    first, second = both(steered, f"steer:{parallel}")
    assert first["modes"] == second["modes"]
    steps = [step for step, *_ in first["modes"]]
    back = next(i for i in range(1, len(steps)) if steps[i] < steps[i - 1])
    assert steps[back] < scenarios.BREAKOUT < steps[back - 1]
    assert all(batch == step for step, _, _, batch in first["modes"]), "the same batches come again"
    assert {mode for _, mode, _, _ in first["modes"]} == {"off", "warmup", "on", "drain"}
    run = run_of(steered, f"steer:{parallel}")
    attempts = (
        run.read("steps", ["rank", "attempt"], attempt="all").drop_duplicates().to_numpy().tolist()
    )
    assert sorted(attempts) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert (run.read("events")["kind"] == "rollback").sum() == 1


def test_after_going_back_both_ways_of_spreading_train_alike(
    steered: tuple[Path, list[Rank]],
) -> None:
    for whole, sharded in zip(both(steered, "steer:ddp"), both(steered, "steer:fsdp"), strict=True):
        assert np.allclose(whole["losses"], sharded["losses"], atol=2e-3)
        assert not np.allclose(whole["losses"], whole["losses"][::-1], atol=2e-3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_resume_from_the_newest_snapshot_that_all_of_them_have(
    together: tuple[Path, list[Rank]], parallel: str
) -> None:
    for said in both(together, f"resumed:{parallel}-newest"):
        assert said["began"] == 8, "rank 0 has one of step 12"
        assert said["after"] == said["before"][8:]


@pytest.mark.parametrize(
    ("accident", "words"),
    [("damaged", "rank-1/step-00000012 is unreadable"), ("all", "(rank 0: 8, 12; rank 1: none)")],
)
def test_where_one_rank_cannot_resume_none_does(
    together: tuple[Path, list[Rank]], accident: str, words: str
) -> None:
    first, second = both(together, f"resumed:ddp-{accident}")
    assert first == second
    assert words in first["error"]


def test_one_ranks_nan_is_everybodys(together: tuple[Path, list[Rank]]) -> None:
    for said in both(together, "one_nan:ddp"):
        assert said["active"] == [False] * 4 + [True, False]


def test_controllers_that_went_apart_end_the_training_on_every_rank(
    together: tuple[Path, list[Rank]],
) -> None:
    first, second = both(together, "apart:ddp")
    assert first == second
    assert "load the same state on every rank" in first["error"]


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_failure_inside_geodiag_on_one_rank_hangs_no_rank(
    together: tuple[Path, list[Rank]], parallel: str
) -> None:
    first, second = both(together, f"broken_inside:{parallel}")
    assert len(first["losses"]) == len(second["losses"]) == 10
    steps = run_of(together, f"broken_inside:{parallel}").read("steps")
    assert steps[steps["rank"] == 0]["step"].tolist() == list(range(10))
    assert steps[steps["rank"] == 1]["step"].tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert together[1][1].heard.count("the end of a step: ZeroDivisionError") == 2, (
        "said once a training"
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_probes_that_fail_on_one_rank_leave_no_collective_to_the_others(
    together: tuple[Path, list[Rank]], parallel: str
) -> None:
    for broken, bare in zip(
        both(together, f"broken_probe:{parallel}"),
        both(together, f"unwatched:{parallel}"),
        strict=True,
    ):
        assert broken["losses"] == bare["losses"]
    layers = run_of(together, f"broken_probe:{parallel}").read("layers")
    probed = layers[layers["step"] == 4]
    for name in (
        "tear",
        "curvature",
        "perturbation_growth",
        "spectral_norm_router",
        "spectral_norm_gate",
    ):
        seen = probed.groupby("rank")[name].count()
        assert (seen[0] > 0, seen[1]) == (True, 0), name


@pytest.mark.parametrize(("what", "steps_done"), [("probe", 4), ("capture", 3)])
def test_a_rank_that_cannot_end_a_forward_on_sharded_weights_ends_the_training(
    tmp_path: Path, what: str, steps_done: int
) -> None:
    first, second = ranks(tmp_path, f"halfway:{what}")
    assert "OutOfMemoryError: on purpose" in second.said[f"halfway:{what}"]["error"]
    assert first.said[f"halfway:{what}"]["error"], "the other's end is noticed"
    steps = geodiag.open_run(tmp_path / f"halfway:{what}" / "run").read("steps", ["rank", "step"])
    assert steps[steps["rank"] == 1]["step"].tolist() == list(range(steps_done)), (
        "a probe's own step too"
    )


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("folder", "cannot write a run to"),
        ("model", "rank 1 has another model"),
        ("snapshots", "holds snapshots of an earlier training"),
    ],
)
def test_where_one_rank_cannot_begin_none_does(
    together: tuple[Path, list[Rank]], what: str, words: str
) -> None:
    first, second = both(together, f"refused:{what}")
    assert first == second
    assert words in first["error"]


@pytest.mark.parametrize("policy", ["off", "auto"])
def test_a_killed_rank_loses_no_completed_step_and_no_rank_hangs(
    tmp_path: Path, policy: str
) -> None:
    first, second = ranks(tmp_path, f"killed:{policy}")
    assert second.code == -9
    assert "lost the connection to the other rank" in first.heard
    folder = tmp_path / f"killed:{policy}"
    run = geodiag.open_run(folder / "run")
    steps = run.read("steps", ["rank", "step", "loss"])
    for rank in (0, 1):
        done = int((folder / f"done-{rank}").read_text())
        mine = steps[steps["rank"] == rank]
        assert mine["step"].tolist()[: done + 1] == list(range(done + 1))
        assert mine["loss"].notna().all()
    if policy == "auto":
        assert first.code == 1
        assert "steps up to 7 are on record" in first.heard
        assert run.status() == "failed"
    else:  # nothing is steered: recording goes on alone
        assert first.said["killed:off"]["done"] == list(range(12))
        assert run.status() == "finished"
    assert run.problems == {"rank-1": "ends at step 6; later steps are of the other ranks"}


@pytest.mark.parametrize("policy", ["off", "auto"])
def test_a_rank_that_no_longer_comes_is_not_waited_for_for_ever(
    tmp_path: Path, policy: str
) -> None:
    first, second = ranks(tmp_path, f"silent:{policy}")
    assert (first.code, second.code) == (0, 0)
    error = first.said[f"silent:{policy}"]["error"]
    assert (error is None) == (policy == "off")
    assert "Timed out" in (error or first.heard)
    steps = geodiag.open_run(tmp_path / f"silent:{policy}" / "run").read("steps")
    assert steps[steps["rank"] == 0]["step"].tolist() == list(range(8 if policy == "off" else 5))


# -- without a process group -----------------------------------------------------------------------


def test_ranks_that_cannot_talk_may_only_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    t = scenarios.made("alone")
    routing = geodiag.AnticipatoryRouting(t.model, 2)
    with pytest.raises(geodiag.GeodiagError, match="init_process_group before attach"):
        geodiag.attach(t.model, t.optimizers, tmp_path / "run", routing=routing, policy="auto")
    with pytest.raises(geodiag.GeodiagError, match="resume on 2 ranks needs them to agree"):
        geodiag.attach(t.model, t.optimizers, tmp_path / "run", routing=routing, resume=True)
    geodiag.attach(t.model, t.optimizers, tmp_path / "run", routing=routing, quiet=True).close()
    assert not (tmp_path / "run" / "run.json").exists(), "rank 0 writes it"


@pytest.mark.parametrize(("length", "heard"), [(10, True), (2000, False)])
def test_a_note_that_is_too_long_is_left_out_and_not_cut(
    monkeypatch: pytest.MonkeyPatch, length: int, heard: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _wire, group: None)
    first = Ranks(0, 2, group=object())
    note = first.exchange(RankMessage(numbers={"here": 1.0}, note={"request": "x" * length})).note
    assert note == ({"request": "x" * length} if heard else {})


def test_a_rank_that_has_nothing_to_say_leaves_the_mean_alone_and_a_nan_does_not() -> None:
    def heard(
        losses: list[float], tokens: list[float], here: Sequence[float] = (1.0, 1.0)
    ) -> float:
        said = {"here": np.array(here), "loss": np.array(losses), "tokens": np.array(tokens)}
        return RankMessages(said, np.zeros(0), {}).loss

    nan = float("nan")
    assert heard([2.0, nan], [100.0, nan], [1.0, nan]) == 2.0
    assert np.isnan(heard([2.0, nan], [100.0, 100.0]))
    assert heard([2.0, 4.0], [100.0, 300.0]) == 3.5
    assert heard([2.0, 4.0], [nan, nan]) == 3.0
    assert heard([2.0, 4.0], [0.0, 0.0]) == 3.0, "tokens were not counted in this step"


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_trains_the_reference_model_and_every_command_reads_the_run(
    tmp_path: Path, parallel: str, cli: Callable[..., Any]
) -> None:
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("a loss spike is a tear in the manifold. " * 400)
    options = [
        "--steps",
        "6",
        "--sequences",
        "2",
        "--data",
        str(text),
        "--inject",
        "expert-scale@3=2",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [
        "-m",
        "geodiag.cli",
        "train",
        "--run-dir",
        str(run),
        "--parallel",
        parallel,
        "--device",
        "cpu",
        *options,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 6/6") == 1, "one rank speaks"
    losses = geodiag.open_run(run).read("steps", ["step", "loss"], ranks="merged")
    alone = tmp_path / "alone"
    assert cli("train", "--run", alone, "--device", "cpu", *options).exit_code == 0
    one = geodiag.open_run(alone).read("steps", ["step", "loss"])
    assert np.allclose(losses["loss"], one["loss"], atol=1e-3)
    assert not np.allclose(losses["loss"], one["loss"] + 0.01, atol=1e-3)
    said = json.loads(cli("show", run, "--json").output)
    assert said["last_step"] == 5
    assert said["loss"] == pytest.approx(float(losses["loss"].iloc[-1]), rel=1e-6)
    assert not said["problems"]
    assert json.loads(cli("spikes", run, "--json").output) == []
    faults = geodiag.open_run(run).read("events")
    assert (faults["kind"] == "fault").sum() == 1


def test_sequences_that_do_not_divide_among_the_ranks_are_one_line() -> None:
    rank_info = RankInfo("cpu")
    rank_info.world = 2
    assert rank_info.share(8, 2) == 4
    with pytest.raises(
        geodiag.GeodiagError, match="3 sequences do not divide among 2 ranks; pass --sequences 2"
    ):
        rank_info.share(3, 1)
