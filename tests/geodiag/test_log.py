"""The logger `geodiag`: stderr by default, the program's own handlers otherwise, never an error."""

import io
import logging
import os
import subprocess
import sys

import pytest

from geodiag import log


@pytest.fixture
def logger(monkeypatch):
    """The logger, put back afterwards; without the handlers of other tests."""
    handlers = log.LOGGER.handlers[:]
    level = log.LOGGER.level
    filters = log.LOGGER.filters[:]
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    yield log.LOGGER
    log.LOGGER.handlers[:] = handlers
    log.LOGGER.filters[:] = filters
    log.LOGGER.setLevel(level)
    log.LOGGER.propagate = True


class Kept(logging.Handler):
    """A program's own handler."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def test_the_lines_go_to_stderr_as_they_are_by_default(logger, capsys):
    log.info("geodiag watches a model; 100 % of it")
    log.warning("geodiag could not record rows")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "geodiag watches a model; 100 % of it\ngeodiag could not record rows\n"


@pytest.mark.parametrize("name", ["geodiag", None])
def test_a_program_routes_the_lines_by_a_handler_of_its_own(logger, capsys, name):
    kept = Kept()
    logging.getLogger(name).addHandler(kept)
    log.info("found")
    log.warning("failed")
    assert kept.lines == [("INFO", "found"), ("WARNING", "failed")]
    assert capsys.readouterr().err == ""


def test_a_handler_of_the_root_is_not_counted_where_the_lines_do_not_reach_it(logger, capsys):
    logging.getLogger().addHandler(Kept())
    logger.propagate = False
    log.warning("failed")
    assert capsys.readouterr().err == "failed\n"


def test_a_program_silences_and_filters_the_lines(logger, capsys):
    logger.setLevel("WARNING")
    log.info("found")
    logger.addFilter(lambda record: "rows" not in record.getMessage())
    log.warning("rows of layers")
    log.warning("steering")
    assert capsys.readouterr().err == "steering\n"


class Broken(io.StringIO):
    """A stderr whose reader is gone."""

    def write(self, _text: str) -> int:
        raise BrokenPipeError("no reader")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed(), Broken()])
def test_a_stderr_that_cannot_be_written_raises_nothing(logger, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    log.warning("failed")


def test_a_handler_that_raises_ends_nothing(logger):
    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("a bug of the program's handler")

    logger.addHandler(Raises())
    log.warning("failed")


def test_the_level_that_a_program_set_before_the_import_is_kept():
    code = (
        "import logging; logging.getLogger('geodiag').setLevel('ERROR');"
        "from geodiag import log; log.warning('silenced'); log.LOGGER.error('printed')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stderr == "printed\n"


def test_a_format_with_the_place_shows_the_caller(logger):
    kept = []
    logger.addFilter(lambda record: kept.append(record.filename) or False)
    log.warning("failed")
    assert kept == [os.path.basename(__file__)]
