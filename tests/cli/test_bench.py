"""`geodiag bench`: every bench has its help and its options, and a mistake is one line."""

import pytest

from geodiag.cli.bench import BENCHES


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_answers_help_and_takes_json_and_out(cli, name: str, capfd) -> None:
    result = cli("bench", name, "--help")
    said = result.output + capfd.readouterr().out
    assert result.exit_code == 0, said
    assert f"usage: geodiag bench {name}" in said
    assert "--json" in said
    assert "--out" in said


@pytest.mark.parametrize("name", BENCHES)
def test_an_unknown_option_of_a_bench_is_one_line_that_names_the_fix(cli, name: str) -> None:
    result = cli("bench", name, "--no-such-option")
    assert result.exit_code == 1
    assert f"geodiag bench {name} --help" in result.stderr or "GPU" in result.stderr
