"""The run that the cascade's speed is measured on: its two cascades are found, and what is read
stays near them.
"""

from pathlib import Path

import pytest

from geodiag.benchmarks.cascade_speed import main, page, write
from geodiag.cascade.explain import cascades
from geodiag.run import Run


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, int]]]:
    path = tmp_path_factory.mktemp("long") / "run"
    return path, write(path, steps=6000, layers=4, experts=4)


def test_both_cascades_are_found_at_their_layer_and_step(
    long_run: tuple[Path, list[tuple[int, int]]],
) -> None:
    path, origins = long_run
    found = cascades(path)
    assert [c.layer for c in found] == [layer for _, layer in origins]
    assert [c.stage for c in found] == [1, 1]
    assert all(abs((c.onset or 0) - at) <= 2 for c, (at, _) in zip(found, origins, strict=True))


def test_only_windows_around_the_spikes_are_read(
    long_run: tuple[Path, list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = [], Run.read_arrow

    def watched(run: Run, table: str, columns=None, steps=None, attempt=None, **more):
        rows = read(run, table, columns, steps, attempt, **more)
        asked.append((table, len(rows)))
        return rows

    monkeypatch.setattr(Run, "read_arrow", watched)
    cascades(long_run[0])
    layers = [n for table, n in asked if table == "layers"]
    assert len(layers) == 2
    assert max(layers) < 400 * 8


def test_the_page_says_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [
        "--steps",
        "600",
        "--layers",
        "2",
        "--experts",
        "2",
        "--times",
        "1",
        "--out",
        str(tmp_path),
    ]
    main([*small, "--run", str(tmp_path / "run")])
    assert "600 steps of 2 layers" in capsys.readouterr().out
    assert "of processor time" in (tmp_path / "cascade_speed.md").read_text()
    assert callable(page)
