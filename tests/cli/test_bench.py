"""`geodiag bench`: every benchmark has help and options, and a mistake is one line."""

import pytest

from geodiag.cli.bench import BENCHES


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_has_help_and_the_options_json_and_out(cli, name: str, capfd) -> None:
    result = cli("bench", name, "--help")
    shown = result.output + capfd.readouterr().out
    assert result.exit_code == 0, shown
    assert f"usage: geodiag bench {name}" in shown
    assert "--json" in shown
    assert "--out" in shown


@pytest.mark.parametrize("name", BENCHES)
def test_an_unknown_option_of_a_benchmark_is_one_line_that_names_the_fix(cli, name: str) -> None:
    result = cli("bench", name, "--no-such-option")
    assert result.exit_code == 1
    assert f"geodiag bench {name} --help" in result.stderr or "GPU" in result.stderr
