"""The project's log: one line per message on stdout, without the chatter of libraries."""

import logging
import shlex
import sys
import warnings

from moco.errors import encodable
from moco.runs.log_file import LogFile
from moco.screen import let_stdout_escape, screen

# Warnings of libraries that say nothing a user could act on.
IGNORED_WARNINGS = (
    ".*does not have many workers.*",
    ".*number of training batches.*smaller than the logging interval.*",
    ".*srun.*available on your system.*",
    ".*GPU available but not used.*",
    # The log says the number of loader processes, which share the processors without harm.
    ".*DataLoader will create .* worker processes in total.*",
    # moco.segment with freeze_backbone=true keeps the backbone in eval mode on purpose.
    ".*in eval mode at the start of training.*",
    ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
)


class StdoutHandler(logging.StreamHandler):
    """Writes to the current ``sys.stdout``, on a terminal above the bars that move there.

    On a terminal, warnings are coloured, and a long message is broken at its words.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        if not screen.is_terminal:
            super().emit(record)
            return
        try:
            screen.print_message(self.format(record), record.levelname)
        except Exception:
            self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        # File names can hold bytes that no encoding has.
        return encodable(super().format(record))


def is_for_users(record: logging.LogRecord) -> bool:
    """Whether a record is ours, or at least a warning of a library."""
    return record.name.startswith("moco") or record.levelno >= logging.WARNING


def set_up_logging(program: str | None = None) -> None:
    """Send the project's log and the warnings of libraries to stdout, and to a file.

    stderr is left for the one line that says why the program ended.

    Args:
        program: ``PROGRAM.log`` gets the log as soon as the program has its run folder; None: there
            is no file.
    """
    let_stdout_escape()
    screen.turn_on()
    handler = StdoutHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    handlers: list[logging.Handler] = [handler]
    if program is not None:
        handlers.append(LogFile(program, shlex.join(sys.orig_argv)))
    # A filter instead of levels: Lightning resets the levels of its loggers when it is imported.
    for each in handlers:
        each.addFilter(is_for_users)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.captureWarnings(True)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)
