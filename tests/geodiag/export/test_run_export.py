"""Exports: what other tools read of them is what `Run.read` says, and an export is whole or not
there.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from geodiag.benchmarks.export_speed import main
from geodiag.events import Event
from geodiag.metrics.schema import METRICS, SCHEMAS
from geodiag.run import Run, open_run
from tests.paths import SAMPLES


def export(
    cli: Callable[..., Any], run: object, to: str, out: Path, *more: object
) -> dict[str, Any]:
    """What `--json` says of an export that works."""
    done = cli("export", run, "--to", to, "--out", out, *more, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def opened(folder: Path) -> EventAccumulator:
    """The event files in a folder, every point of them."""
    found = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def points(folder: Path, tag: str) -> dict[int, float]:
    """A curve: step → value."""
    return {p.step: p.value for p in opened(folder).Scalars(tag)}


def read_csv(path: Path, table: str) -> pd.DataFrame:
    """A table's CSV with the types that columns.csv says."""
    about = pd.read_csv(path.parent / "columns.csv", keep_default_na=False)
    kinds = about[about["table"] == table].set_index("column")["type"]
    floats = {n: k for n, k in kinds.items() if str(k).startswith("float")}
    return pd.read_csv(path, dtype=floats)  # type: ignore[arg-type]


def same(got: pd.DataFrame, table: str, truth: pd.DataFrame) -> None:
    """Both frames hold the same bits, column by column."""
    assert list(got.columns) == list(truth.columns)
    assert len(got) == len(truth)
    for name in truth.columns:
        want = truth[name]
        if (table, name) in METRICS or name == "value":
            assert got[name].dtype == np.float32
            np.testing.assert_array_equal(
                got[name].to_numpy(), want.to_numpy(), err_msg=f"{table}.{name}"
            )
        elif name == "experts":
            lists = [
                [] if not isinstance(x, str) else [int(n) for n in x.split()]
                for x in got[name].astype(object)
            ]
            assert lists == [[] if x is None else list(x) for x in want]
        else:
            assert got[name].astype(object).where(got[name].notna(), None).tolist() == (
                want.astype(object).where(want.notna(), None).tolist()
            ), f"{table}.{name}"


# -- CSV -----------------------------------------------------------------------------------


def test_every_table_of_a_recorded_run_reads_back_as_csv_exactly(cli, tmp_path: Path) -> None:
    said = export(cli, SAMPLES / "mhc-tear", "csv", tmp_path / "out")
    run = open_run(SAMPLES / "mhc-tear")
    assert set(said["rows"]) == set(SCHEMAS)
    for table in SCHEMAS:
        same(read_csv(tmp_path / "out" / f"{table}.csv", table), table, run.read(table))
    by_file = {f["file"]: f.get("rows") for f in said["files"]}
    assert by_file == {f"{t}.csv": n for t, n in said["rows"].items()} | {"columns.csv": None}


def test_any_float_comes_back_to_the_bit_and_an_empty_cell_is_no_nan(cli, tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    floats = bits.view(np.float32)
    floats[:4] = [math.inf, -math.inf, math.nan, -0.0]
    run = Run.create(tmp_path / "run")
    run.append("steps", {"step": range(5000), "loss": floats, "grad_norm": [None] * 5000})
    run.close()
    export(cli, tmp_path / "run", "csv", tmp_path / "out", "--metrics", "loss,grad_norm")
    got = read_csv(tmp_path / "out/steps.csv", "steps")
    same(got, "steps", open_run(tmp_path / "run").read("steps", list(got.columns)))
    third = (tmp_path / "out/steps.csv").read_text().splitlines()[3]
    assert third == "0,0,2,,nan,"


def test_quotes_commas_and_lines_in_words_survive(make_run, cli, tmp_path: Path) -> None:
    run = make_run(close=False)
    words = 'it said "no",\nand stopped; naïve'
    run.event(Event(step=3, kind="problem", message=words, data={"a": [1, "x,y"]}))
    run.close()
    export(cli, tmp_path / "run", "csv", tmp_path / "out", "--tables", "events")
    same(
        read_csv(tmp_path / "out/events.csv", "events"),
        "events",
        open_run(tmp_path / "run").read("events"),
    )


def test_columns_csv_has_unit_and_meaning_of_every_column_that_was_written(
    cli, tmp_path: Path
) -> None:
    export(cli, SAMPLES / "mhc-tear", "csv", tmp_path / "out")
    about = pd.read_csv(tmp_path / "out/columns.csv", keep_default_na=False)
    written = {
        (t, n) for t in SCHEMAS for n in pd.read_csv(tmp_path / "out" / f"{t}.csv", nrows=0).columns
    }
    assert set(zip(about["table"], about["column"], strict=True)) == written
    assert (about["meaning"] != "").all()
    loss = about[(about["table"] == "steps") & (about["column"] == "loss")].iloc[0]
    assert (loss["type"], loss["unit"], loss["meaning"]) == (
        "float32",
        "nats/token",
        METRICS["steps", "loss"].help,
    )


@pytest.mark.parametrize("to", ["csv", "tensorboard"])
def test_an_export_in_many_pieces_is_that_in_one(cli, tmp_path: Path, monkeypatch, to: str) -> None:
    export(cli, SAMPLES / "hc", to, tmp_path / "one")
    monkeypatch.setattr("geodiag.export.rows.CELLS", 1)
    monkeypatch.setattr("geodiag.store.step_chunks.NEWEST_STEPS", 16)
    export(cli, SAMPLES / "hc", to, tmp_path / "many")
    one, many = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.name != "export.json"}
        for n in ("one", "many")
    )
    assert one == many


# -- TensorBoard ---------------------------------------------------------------------------


def test_every_curve_has_every_value_that_was_recorded_and_no_other(cli, tmp_path: Path) -> None:
    tables = ("steps", "layers", "experts", "tokens", "domains")
    said = export(
        cli, SAMPLES / "hc", "tensorboard", tmp_path / "out",
        "--tables", ",".join(tables), "--places", "all",
        "--steps", "100:160",
    )  # fmt: skip
    seen, run, want = opened(tmp_path / "out"), open_run(SAMPLES / "hc"), {}
    for table in tables:
        for row in run.read_arrow(table, steps=(100, 160)).to_pylist():
            where = "".join(
                [
                    f" token {row['token']}" if table == "tokens" else "",
                    f" {row['domain']}" if table == "domains" else "",
                    f" layer {row['layer']:02d}" if "layer" in row else "",
                    f" {row['site']}" if row.get("site") else "",
                    f" expert {row['expert']:03d}" if table == "experts" else "",
                ]
            ).strip()
            for (of, name), _ in METRICS.items():
                if of == table and row[name] is not None:
                    tag = name if table == "steps" else f"{table}/{name}/{where}"
                    want.setdefault(tag, []).append((row["step"], row[name]))
    assert set(seen.Tags()["scalars"]) == set(want)
    for tag, curve in want.items():
        np.testing.assert_array_equal(
            [(p.step, p.value) for p in seen.Scalars(tag)], curve, err_msg=tag
        )
    assert said["values"] == sum(map(len, want.values()))
    assert said["tags"] == len([*want, "configuration"])


def test_by_default_curves_of_layers_are_the_worst_and_the_mean_and_a_nan_shows(
    cli, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run")
    flips = np.ma.masked_array(
        [0.25, 0.75, 0.5, math.nan, 1, 1, 1, 1], mask=[0, 0, 0, 0, 0, 1, 1, 1]
    )
    rows = {"step": np.repeat(range(4), 2), "layer": [0, 1] * 4, "site": "ffn"}
    run.append(
        "layers", rows | {"flip_rate": flips, "router_entropy": flips, "branch_share": flips}
    )
    run.append("steps", {"step": range(4), "loss": [1.0, 2.0, 3.0, 4.0]})
    run.close()
    export(cli, tmp_path / "run", "tensorboard", tmp_path / "out")
    curve = {
        tag: points(tmp_path / "out", tag) for tag in opened(tmp_path / "out").Tags()["scalars"]
    }
    assert set(curve) == {"loss", *(f"layers/{n}" for n in (
        "flip_rate/max", "flip_rate/mean", "router_entropy/min", "router_entropy/mean",
        "branch_share/mean",
    ))}  # fmt: skip
    assert curve["layers/flip_rate/max"] == pytest.approx(
        {0: 0.75, 1: math.nan, 2: 1.0}, nan_ok=True
    )
    assert curve["layers/flip_rate/mean"] == pytest.approx(
        {0: 0.5, 1: math.nan, 2: 1.0}, nan_ok=True
    )
    assert curve["layers/router_entropy/min"] == pytest.approx(
        {0: 0.25, 1: math.nan, 2: 1.0}, nan_ok=True
    )


def test_metrics_that_are_named_are_curves_of_every_place(make_run, cli, tmp_path: Path) -> None:
    make_run()
    export(
        cli,
        tmp_path / "run",
        "tensorboard",
        tmp_path / "out",
        "--metrics",
        "composite*",
        "--metrics",
        "loss",
    )
    tags = opened(tmp_path / "out").Tags()["scalars"]
    assert sorted(tags) == sorted(
        [
            "loss",
            *(
                f"layers/composite_gain_fwd/layer {i:02d} {s}"
                for i in range(3)
                for s in ("attn", "ffn")
            ),
        ]
    )


def test_a_curve_says_its_unit_and_meaning(make_run, cli, tmp_path: Path) -> None:
    make_run()
    export(cli, tmp_path / "run", "tensorboard", tmp_path / "out")
    about = opened(tmp_path / "out").SummaryMetadata("layers/flip_rate/max")
    assert about.summary_description == f"{METRICS['layers', 'flip_rate'].help} Unit: share"
    assert about.plugin_data.plugin_name == "scalars"


def test_events_and_configuration_are_texts(cli, tmp_path: Path) -> None:
    export(cli, SAMPLES / "mhc-tear", "tensorboard", tmp_path / "out")
    seen = opened(tmp_path / "out")

    def texts(tag: str) -> dict[int, str]:
        return {t.step: t.tensor_proto.string_val[0].decode() for t in seen.Tensors(tag)}

    events = open_run(SAMPLES / "mhc-tear").read("events")
    for e in events.itertuples():
        assert e.message in texts(f"events/{e.kind}")[e.step]
    (trail,) = texts("events").values()
    assert len(trail.splitlines()) == len(events) + 2
    assert '"sinkhorn_iterations": 20' in texts("configuration")[0]
    spike = seen.Tensors("events/spike")[0]
    assert spike.wall_time == events[events["kind"] == "spike"]["time"].iloc[0]
    hparams = seen.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"options.residual" in hparams


def test_events_that_share_a_step_and_those_of_repeated_steps_are_all_told(
    cli, tmp_path: Path
) -> None:
    run = Run.create(tmp_path / "run")
    for step, message in ((5, "first"), (5, "second"), (9, "third")):
        run.append("steps", {"step": [step], "loss": [1.0]})
        run.event(Event(step=step, kind="decision", message=message))
    run.next_attempt()
    run.append("steps", {"step": [7], "loss": [1.0]})
    run.event(Event(step=7, kind="decision", message="again"))
    run.close()
    export(cli, tmp_path / "run", "tensorboard", tmp_path / "out")
    told = [
        (t.step, t.tensor_proto.string_val[0].decode())
        for t in opened(tmp_path / "out").Tensors("events/decision")
    ]
    assert [step for step, _ in told] == [5, 7, 9], (
        "a step that comes back would make TensorBoard drop the later ones"
    )
    assert "first" in told[0][1]
    assert "second" in told[0][1]


def test_wall_times_are_those_that_were_recorded(cli, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.append("steps", {"step": range(5), "loss": 1.0, "step_seconds": [None, 2, 2, 2, 2]})
    run.next_attempt()
    run.append("steps", {"step": range(3, 6), "loss": 2.0, "step_seconds": [30.0, 4, 4]})
    run.append("layers", {"step": [5], "layer": 0, "site": "ffn", "flip_rate": [0.5]})
    run.close()
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    for entry, began in zip(manifest["attempts"], (1000.0, 2000.0), strict=True):
        entry["time"] = began
    (tmp_path / "run/run.json").write_text(json.dumps(manifest))
    export(cli, tmp_path / "run", "tensorboard", tmp_path / "out")
    seen = opened(tmp_path / "out")
    times = {p.step: p.wall_time for p in seen.Scalars("loss")}
    assert times == {0: 1000, 1: 1002, 2: 1004, 3: 2000, 4: 2004, 5: 2008}
    assert seen.Scalars("layers/flip_rate/max")[0].wall_time == 2008


# -- attempts, ranks, steps ----------------------------------------------------------------


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """A run that went back from step 5 to step 3."""
    run = Run.create(tmp_path / "twice")
    run.append("steps", {"step": range(6), "loss": [float(i) for i in range(6)]})
    run.event(Event(step=5, kind="rollback", message="back"))
    run.next_attempt()
    run.append("steps", {"step": range(3, 8), "loss": [10.0 + i for i in range(3, 8)]})
    run.close()
    return tmp_path / "twice"


def test_the_newest_attempt_is_one_curve_and_all_of_them_are_runs_of_their_own(
    twice: Path, cli, tmp_path
) -> None:
    export(cli, twice, "tensorboard", tmp_path / "newest")
    assert points(tmp_path / "newest", "loss") == {
        0: 0,
        1: 1,
        2: 2,
        3: 13,
        4: 14,
        5: 15,
        6: 16,
        7: 17,
    }
    export(cli, twice, "tensorboard", tmp_path / "all", "--attempt", "all")
    assert points(tmp_path / "all/attempt-0", "loss") == {i: float(i) for i in range(6)}
    assert points(tmp_path / "all/attempt-1", "loss") == {i: 10.0 + i for i in range(3, 8)}
    assert "events/rollback" in opened(tmp_path / "all/attempt-0").Tags()["tensors"]
    export(cli, twice, "csv", tmp_path / "first", "--attempt", "0")
    assert read_csv(tmp_path / "first/steps.csv", "steps")["step"].tolist() == list(range(6))
    export(cli, twice, "csv", tmp_path / "csv", "--attempt", "all")
    same(
        read_csv(tmp_path / "csv/steps.csv", "steps"),
        "steps",
        open_run(twice).read("steps", attempt="all"),
    )


def test_ranks_are_put_together_unless_they_are_wanted_apart(cli, tmp_path: Path) -> None:
    for rank in (0, 1):
        run = Run.create(tmp_path / "run", rank=rank, world_size=2, attempt=0 if rank else None)
        run.append("steps", {"step": range(3), "loss": [1.0 + 2 * rank] * 3})
        run.append(
            "layers",
            {"step": [0, 0], "layer": 0, "site": ["attn", "ffn"], "stream_amax": [1.0 + rank, 5.0]},
        )
        run.close()
    export(cli, tmp_path / "run", "tensorboard", tmp_path / "one")
    assert points(tmp_path / "one", "loss") == {0: 2, 1: 2, 2: 2}
    export(cli, tmp_path / "run", "tensorboard", tmp_path / "each", "--ranks", "each")
    assert points(tmp_path / "each/rank-1", "loss") == {0: 3, 1: 3, 2: 3}
    run = open_run(tmp_path / "run")
    for ranks in ("merged", "each"):
        export(cli, tmp_path / "run", "csv", tmp_path / f"csv-{ranks}", "--ranks", ranks)
        for table in ("steps", "layers"):
            truth = run.read(table, ranks=ranks)  # type: ignore[arg-type]
            same(read_csv(tmp_path / f"csv-{ranks}/{table}.csv", table), table, truth)


@pytest.mark.parametrize(
    ("words", "first", "last"), [("5:8", 5, 7), (":3", 0, 2), ("17:", 17, 19), ("18:900", 18, 19)]
)
def test_steps_are_a_range_whose_ends_may_be_open(
    make_run, cli, tmp_path, words, first, last
) -> None:
    make_run()
    export(cli, tmp_path / "run", "csv", tmp_path / "out", "--steps", words)
    for table in ("steps", "layers"):
        steps = read_csv(tmp_path / f"out/{table}.csv", table)["step"]
        assert (steps.min(), steps.max()) == (first, last)


def test_a_run_that_trains_is_exported_as_far_as_it_is(make_run, cli, tmp_path: Path) -> None:
    run = make_run(close=False)
    export(cli, tmp_path / "run", "csv", tmp_path / "out")
    assert len(read_csv(tmp_path / "out/steps.csv", "steps")) == 20
    export(cli, tmp_path / "run", "tensorboard", tmp_path / "tb")
    assert len(points(tmp_path / "tb", "loss")) == 20
    run.close()


def test_a_run_behind_a_url_is_exported(make_run, cli, tmp_path: Path) -> None:
    make_run()
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "run"), "/export-me", recursive=True)
    try:
        export(cli, "memory://export-me", "csv", tmp_path / "out")
    finally:
        memory.rm("/export-me", recursive=True)
    same(
        read_csv(tmp_path / "out/layers.csv", "layers"),
        "layers",
        open_run(tmp_path / "run").read("layers"),
    )


# -- what is said --------------------------------------------------------------------------


def test_it_says_what_was_written_what_was_left_out_and_what_to_do_next(
    cli, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = cli("export", SAMPLES / "hc", "--to", "tensorboard").output
    assert "exports/tensorboard/hc  1 file," in said
    assert "layers: worst and mean only; for one curve each pass --places all" in said
    assert "left out: experts, tokens" in said
    assert "tensorboard --logdir exports/tensorboard/hc" in said
    assert "layers.csv  3,600 rows" in cli("export", SAMPLES / "hc", "--to", "csv").output
    assert sorted(os.listdir("exports/tensorboard") + os.listdir("exports/csv")) == ["hc", "hc"]


@pytest.mark.slow
def test_neither_torch_nor_tensorflow_is_loaded(make_run, tmp_path: Path) -> None:
    make_run()
    for to in ("csv", "tensorboard"):
        code = (
            "import sys\nfrom geodiag.cli.main import app\n"
            f"app(['export', 'run', '--to', '{to}', '--json'], standalone_mode=False)\n"
            "print(sorted({'torch', 'tensorflow', 'dash'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert done.stdout.splitlines()[-1] == "[]"
        assert done.stderr == ""


# -- what goes wrong -----------------------------------------------------------------------


def refused(done: Any, *words: str) -> None:
    """One line that holds these words, exit code 1."""
    said = done.stderr.strip()
    assert done.exit_code == 1, done.output
    assert "\n" not in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--metrics", "amax_gian_fwd"],
            ["no metric is called 'amax_gian_fwd'", "did you mean amax_gain_fwd"],
        ),
        (["--metrics", "zzz*"], ["no metric is called 'zzz*'", "docs/metrics.md"]),
        (["--tables", "layer"], ["no table 'layer'", "did you mean layers"]),
        (
            ["--tables", "steps,layers", "--metrics", "loss"],
            ["layers records none of loss", "--tables"],
        ),
        (["--steps", "5"], ["--steps 5 names no steps", "A:B"]),
        (["--steps", "9:5"], ["holds no step"]),
        (["--steps", "500:"], ["recorded nothing of what is asked for", "it holds steps 0 to 19"]),
        (["--attempt", "7"], ["recorded nothing of what is asked for", "attempt 0"]),
        (["--attempt", "oldest"], ["no attempt 'oldest'", "newest, all, or a number"]),
        (["--metrics", "curvature"], ["recorded nothing of what is asked for"]),
        (["--to", "csv", "--places", "all"], ["--places is about curves"]),
        (["--tables", "matrices"], ["no curves for the table matrices", "--to csv"]),
        (["--to", "wandb"], ["'wandb' is not one of", "--help"]),
        (["--out", "s3://bucket/x"], ["pass a folder on this machine"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_fix_and_leaves_nothing(
    make_run, cli, tmp_path, monkeypatch, more, words
):
    make_run()
    monkeypatch.chdir(tmp_path)
    refused(cli("export", "run", "--to", "tensorboard", *more), *words)
    assert os.listdir(tmp_path) == ["run"]


def test_a_run_without_rows_says_so(cli, tmp_path: Path) -> None:
    Run.create(tmp_path / "empty").close()
    refused(
        cli("export", tmp_path / "empty", "--to", "csv", "--out", tmp_path / "out"),
        "recorded no step yet",
    )


def test_a_folder_in_use_is_left_alone_and_an_older_export_is_replaced_when_asked(
    make_run, cli, tmp_path
) -> None:
    make_run()
    out, run = tmp_path / "out", tmp_path / "run"
    out.mkdir()
    export(cli, run, "csv", out)  # an empty folder is free
    refused(cli("export", run, "--to", "csv", "--out", out), "is not empty", "--force")
    export(cli, run, "csv", out, "--force", "--tables", "steps")
    assert sorted(os.listdir(out)) == ["columns.csv", "export.json", "steps.csv"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    refused(
        cli("export", run, "--to", "csv", "--out", mine, "--force"),
        "was not written by geodiag export",
    )
    assert (mine / "thesis.tex").exists()
    refused(cli("export", run, "--to", "csv", "--out", run / "csv"), "is inside the run")
    refused(
        cli("export", run, "--to", "csv", "--out", mine / "thesis.tex"), "cannot write", "--out"
    )
    refused(
        cli("export", run, "--to", "csv", "--out", "/proc"),
        "/proc is a disk of its own",
        "a folder in it",
    )
    refused(
        cli("export", run, "--to", "csv", "--out", "/proc/x/y"), "cannot write /proc/x/y", "--out"
    )


def test_an_older_export_stays_where_the_new_one_fails(make_run, cli, tmp_path: Path) -> None:
    make_run()
    export(cli, tmp_path / "run", "csv", tmp_path / "out")
    refused(
        cli(
            "export",
            tmp_path / "run",
            "--to",
            "csv",
            "--out",
            tmp_path / "out",
            "--force",
            "--steps",
            "99:",
        )
    )
    assert (tmp_path / "out/layers.csv").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_a_piece_that_cannot_be_read_ends_the_export_unless_the_rest_is_wanted(
    make_run, cli, tmp_path: Path
) -> None:
    make_run()
    (part,) = (tmp_path / "run/layers/rank-0").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    ask = ("export", tmp_path / "run", "--to", "csv", "--out", tmp_path / "out")
    refused(cli(*ask), f"cannot read layers/rank-0/{part.name}", "unreadable", "--partial")
    assert not (tmp_path / "out").exists()
    said = cli(*ask, "--partial")
    assert said.exit_code == 0
    assert "not read: layers/rank-0" in said.output
    assert sorted(os.listdir(tmp_path / "out")) == ["columns.csv", "export.json", "steps.csv"]


def test_without_tensorboard_the_line_says_how_to_get_it(
    make_run, cli, tmp_path: Path, monkeypatch
) -> None:
    make_run()
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    refused(
        cli("export", tmp_path / "run", "--to", "tensorboard", "--out", tmp_path / "out"),
        "pip install tensorboard",
    )
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["csv", "tensorboard"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, to: str) -> None:
    shutil.copytree(SAMPLES / "hc", tmp_path / "run")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from geodiag.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "export", "run", "--to", to, "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("geodiag: cannot write out: ")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["csv", "tensorboard"])
def test_control_c_leaves_nothing(tmp_path: Path, to: str) -> None:
    code = (
        "import time, geodiag.export.run_export as e\n"
        "def slow(done, total, what): print('going', flush=True); time.sleep(60)\n"
        "e.Pieces.__len__ = lambda self: slow(0, 0, '') or 1\n"
        "import contextlib, geodiag.cli.export as c\n"
        "c.bar = lambda beginning: contextlib.nullcontext(slow)\n"
        "from geodiag.cli.main import main; main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "export",
        str(SAMPLES / "hc"),
        "--to",
        to,
        "--out",
        "out",
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "going\n"
        (half,) = os.listdir(tmp_path)
        assert half.startswith(".out.")
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (130, "")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_bench_says_what_an_export_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--steps", "100", "--layers", "2", "--experts", "2", "--out", str(tmp_path)])
    assert "100 steps of 2 layers" in capsys.readouterr().out
    formats = json.loads((tmp_path / "export_speed.json").read_text())["formats"]
    assert formats["csv"]["rows"] == 100 * (1 + 2 * 2 + 2 * 2) + 2
    assert formats["tensorboard"]["rows"] == 100 * (1 + 2 * 2) + 2
