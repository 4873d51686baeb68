"""`geodiag run` records trainings of every make, bit for bit as they are without it."""

from pathlib import Path

import pytest

from tests.hooks.autorecord import unedited
from tests.hooks.autorecord.watching import recorded, unwatched, watched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "few.py").write_text(unedited.FEW)
    return tmp_path


SCRIPTS = {
    name: getattr(unedited, name)
    for name in (
        *(
            "PLAIN",
            "ACCUMULATED",
            "TWO_OPTIMIZERS",
            "EVALUATED",
            "ADVERSARIES",
            "SCALED",
            "CLOSURE",
            "COMPILED",
        ),
        *("IN_PLACE", "BY_LAYER", "COMPILED_STEP", "RESUMED", "IN_BACKWARD", "EXPERTS"),
    )
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_training_is_bit_for_bit_the_same_and_every_step_with_its_loss_is_on_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    done = watched(folder, SCRIPTS[name])
    assert done.returncode == 0, done.stderr
    run = recorded(folder, done)
    assert done.stdout == unwatched(folder, monkeypatch)
    steps, layers = run.read("steps"), run.read("layers")
    first = 900 if name == "RESUMED" else 0
    assert steps["step"].tolist() == list(range(first, first + len(steps)))
    assert layers.groupby("step")["stream_rms"].apply(lambda c: c.notna().all()).all(), (
        "the first step, too"
    )
    if name not in ("SCALED", "IN_BACKWARD"):
        assert steps["grad_norm"].notna().all()
    assert len(run.read("tokens")), "the first batch is the probes'"
    assert steps["tokens"].tolist() == [96.0 if name == "ACCUMULATED" else 48.0] * len(steps)
    if name == "PLAIN":
        assert steps["lr"].tolist() == pytest.approx([0.01 / (1 + i) for i in range(4)]), (
            "of the step, not of the next"
        )
    if name == "ACCUMULATED":
        norms = [float(line) for line in done.stderr.splitlines() if line[0].isdigit()]
        assert steps["grad_norm"].tolist() == norms, "before it was clipped"
    if name == "ADVERSARIES":
        assert done.stderr.count("what that one trains is not recorded") == 1
    if name == "EXPERTS":
        assert run.read("experts")["load"].notna().all()
        assert run.manifest["found"]["family"] == "reference (mhc)"
