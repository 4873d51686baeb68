"""The live line of a training at every width of the terminal."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from geodiag.cli.progress import columns

DESCRIPTION = "loss 2.346  grad 13.37  gain ×1.02  flips 50 %  spike  routing on"


def line(width: int) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system=None)
    progress = Progress(*columns(width, 240), console=console)
    progress.add_task(DESCRIPTION, total=240, completed=77)
    console.print(progress.get_renderable())
    return output.getvalue().rstrip("\n")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_step_and_the_loss_are_on_one_line_at_every_width(width: int) -> None:
    shown = line(width)
    assert "\n" not in shown
    assert shown.startswith("step 77/240 ")
    assert "loss 2.346" in shown


def test_time_and_bar_need_a_wide_terminal() -> None:
    assert DESCRIPTION in line(80)
    assert ":" not in line(80)
    assert ":" in line(100)
    assert "━" not in line(100)
    assert "━" in line(140)
