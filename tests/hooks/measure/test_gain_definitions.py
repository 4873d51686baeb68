"""Gains of the mean map beside means of the gains, and the product of norms, against float64; old
runs still open.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import geodiag
from geodiag.metrics.schema import SCHEMA_VERSION, SCHEMAS
from tests.geodiag.store import kills
from tests.hooks import slow, small
from tests.hooks.test_monitor import Seen
from tests.paths import SAMPLES

SAMPLE = SAMPLES / "hc"


@pytest.mark.parametrize("residual", ["hc", "mhc"])
def test_gains_of_the_mean_map_and_products_of_norms_follow_their_definitions(
    tmp_path: Path, residual: str
) -> None:
    t = small.trainer(residual)
    with small.watch(t, tmp_path / "run") as monitor:
        small.train(t, 4, monitor)
        seen = Seen(t.model)
        small.train(t, 1, monitor, start=4)
    rows = geodiag.open_run(tmp_path / "run").read("layers", steps=(4, 5)).to_dict("records")
    res = torch.stack(seen.res).numpy()
    mean = res.mean(1, keepdims=True)
    forward, backward = slow.composites_fwd(mean), slow.composites_bwd(mean)
    norms = np.linalg.norm(res, 2, axis=(2, 3))
    share, apart = 1.0, []
    for s, row in enumerate(rows):
        share *= slow.mean_gain_fwd_min(mean[s])
        expected = {
            "amax_gain_fwd_of_mean": slow.mean_amax_fwd(mean[s]),
            "amax_gain_bwd_of_mean": slow.mean_amax_bwd(mean[s]),
            "gain_fwd_min_of_mean": slow.mean_gain_fwd_min(mean[s]),
            "gain_bwd_min_of_mean": slow.mean_gain_fwd_min(mean[s].transpose(0, 2, 1)),
            "composite_gain_fwd_of_mean": slow.mean_amax_fwd(forward[s]),
            "composite_gain_bwd_of_mean": slow.mean_amax_bwd(backward[s]),
            "composite_gain_fwd_min_of_mean": slow.mean_gain_fwd_min(forward[s]),
            "composite_gain_bwd_min_of_mean": slow.mean_gain_fwd_min(
                backward[s].transpose(0, 2, 1)
            ),
            "early_signal_share": share,
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4), (name, s)
        product = np.prod(norms[s:], axis=0).mean()
        assert row["spectral_norm_product"] == pytest.approx(product, rel=5e-3), s
        apart.append(abs(np.prod(norms[: s + 1], axis=0).mean() / product - 1))
    if residual == "hc":
        assert max(apart) > 0.02, (
            "the twin: the product from the first site to here is another number"
        )
        both = [(r["amax_gain_fwd"], r["amax_gain_fwd_of_mean"]) for r in rows]
        assert any(a != pytest.approx(b, rel=1e-3) for a, b in both), "the two definitions differ"


def test_a_run_of_the_first_version_opens_and_reads_as_if_nothing_new_was_sampled(
    tmp_path: Path,
) -> None:
    shutil.copytree(SAMPLE, tmp_path / "run")
    for table in ("tokens", "domains"):
        shutil.rmtree(tmp_path / "run" / table, ignore_errors=True)
    said = json.loads((tmp_path / "run/run.json").read_text()) | {"schema_version": 1}
    said["config"].pop("cadence", None)
    (tmp_path / "run/run.json").write_text(json.dumps(said))
    run = geodiag.open_run(tmp_path / "run")
    assert len(run.read("layers")) > 0
    assert run.read("tokens").columns.tolist() == SCHEMAS["tokens"].names
    assert len(run.read("tokens")) == len(run.read("domains")) == 0
    assert run.problems == {}
    said["schema_version"] = SCHEMA_VERSION + 1
    (tmp_path / "run/run.json").write_text(json.dumps(said))
    assert "upgrade geodiag" in geodiag.open_run(tmp_path / "run").problems["run.json"], (
        "the twin: a newer one says so"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--every", "amax_gian=1"), "did you mean amax_gain"),
        (("--every", "ten"), "METRIC=STEPS"),
        (("--every", "0"), "METRIC=STEPS"),
        (("--layers", "0-9"), "the model has no layer 6"),
        (("--layers", "x"), "names no layers"),
        (("--trace", "those"), "pass flipped, margin, or places"),
    ],
)
def test_a_mistaken_cadence_layer_or_token_is_one_line_with_the_fix(
    cli, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    data = kills.text(tmp_path)
    done = cli("train", "--steps", 1, "--data", data, "--run", tmp_path / "run", *options)
    assert done.exit_code == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
