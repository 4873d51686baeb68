"""`geodiag bench rollback`: what it says is what it measured, and a rollback that lost a bit would
be seen.
"""

import json
from pathlib import Path

import pytest
from torch import Tensor

from geodiag.benchmarks import rollback


def test_the_bench_finds_that_everything_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollback.main(["--sequences", "2", "--rounds", "1", "--out", str(tmp_path), "--json"])
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["differ_after_restore"] == 0 < found["changed_by_two_steps"]
    assert found["losses_repeat"]
    assert found["snapshot_bytes"] > 4 * 2 * found["parameters"], (
        "weights and at least one state of each"
    )
    page = (tmp_path / "rollback.md").read_text()
    assert f"**{found['restore_seconds']:.2f} s**" in page
    assert "the same bits" in page


def test_a_rollback_that_forgets_a_buffer_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from geodiag.hooks.snapshots import state_tree as state

    def forgetful(module: object) -> dict[str, Tensor]:
        found = tensors(module)  # type: ignore[arg-type]
        return {n: t for n, t in found.items() if not n.endswith("balance")}

    tensors = state._tensors_of
    monkeypatch.setattr(state, "_tensors_of", forgetful)
    found = rollback.run("tiny", 2, 1, "cpu")
    assert found["differ_after_restore"] > 0
