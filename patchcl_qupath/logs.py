"""The package's log on standard error: warnings, and what -v asks for."""

from __future__ import annotations

import logging
import sys

_PACKAGE = logging.getLogger("patchcl_qupath")
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)  # by the number of -v


class _Handler(logging.Handler):
    """Writes to what is standard error at the time: rich puts a stream in its place that prints
    above the progress bars. click.echo would write past that, into the bars.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # as logging's own handlers do
            self.handleError(record)


def level_of(verbosity: int) -> int:
    """The level of logging for a number of -v."""
    return _LEVELS[min(verbosity, len(_LEVELS) - 1)]


def show_logs(level: int) -> None:
    """Show the package's log from a level on, in place of what was shown before."""
    hide_logs()
    form = "%(levelname)s: %(message)s"
    if level < logging.WARNING:
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler = _Handler()
    handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
    _PACKAGE.addHandler(handler)
    _PACKAGE.setLevel(level)


def hide_logs() -> None:
    """Leave the log to whoever imports the package."""
    for handler in [*_PACKAGE.handlers]:
        if isinstance(handler, _Handler):
            _PACKAGE.removeHandler(handler)
    _PACKAGE.setLevel(logging.NOTSET)


def level_shown() -> int | None:
    """The level of ``show_logs``; None where it was not called, as in a notebook."""
    shown = any(isinstance(handler, _Handler) for handler in _PACKAGE.handlers)
    return _PACKAGE.level if shown else None
