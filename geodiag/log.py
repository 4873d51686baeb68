"""The logger `geodiag`: what was found in a model, and what could not be recorded.

A program that configures logging receives the lines like those of any library:

    logging.getLogger("geodiag").addHandler(...)          # route them
    logging.getLogger("geodiag").setLevel("ERROR")        # silence them

A program that configures no handler, for this logger or for the root logger, gets the lines on
stderr as they are. Logging never raises: a closed stderr or a handler that fails must not end a
training.
"""

import logging
import sys

LOGGER = logging.getLogger("geodiag")


class _DefaultHandler(logging.Handler):
    """Prints to stderr, unless the program has a handler of its own for the logger."""

    def emit(self, record: logging.LogRecord) -> None:
        if not self._program_has_handler():
            print(record.getMessage(), file=sys.stderr, flush=True)

    def _program_has_handler(self) -> bool:
        others = [h for h in LOGGER.handlers if h is not self]
        return bool(others) or bool(LOGGER.propagate and LOGGER.parent and LOGGER.parent.handlers)


if not any(isinstance(handler, _DefaultHandler) for handler in LOGGER.handlers):
    LOGGER.addHandler(_DefaultHandler())
if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)


def info(line: str) -> None:
    """Log what geodiag found or did."""
    _log(logging.INFO, line)


def warning(line: str) -> None:
    """Log what geodiag could not do."""
    _log(logging.WARNING, line)


def _log(level: int, line: str) -> None:
    try:
        # "%s", because a line may contain a percent sign. The caller of `info` and `warning` is
        # two frames up: a program's format may show its file and line.
        LOGGER.log(level, "%s", line, stacklevel=3)
    except Exception:  # a closed stderr, a broken pipe, a handler that fails: the training goes on
        return
