"""The log of a run as a file: ``train.log`` in the run folder, or another program's name."""

import logging
import time
from contextlib import suppress
from pathlib import Path

from moco.errors import encodable

TIME = "%Y-%m-%d %H:%M:%S"


class LogFile(logging.Handler):
    """Write everything that is logged to a file of the run folder.

    A program logs before it may write to the folder. Until `open` is called, the lines are kept.
    A resumed run goes on at the end of the file. A disk that is full ends the file, not the run:
    what the run needs to write will say so.

    Args:
        program: the file is ``PROGRAM.log``.
        command: what was started, for the first line of each process.
    """

    def __init__(self, program: str, command: str) -> None:
        super().__init__()
        self.program = program
        self.kept = [stamped(f"started: {command}")]
        """Lines from before there was a file."""
        self.path: Path | None = None
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt=TIME))

    def open(self, folder: Path) -> None:
        """Write to this folder from now on, and first what was logged before."""
        kept, self.kept = self.kept, []
        self.path = folder / f"{self.program}.log"
        self.write(*kept)

    def emit(self, record: logging.LogRecord) -> None:
        self.write(self.format(record))

    def write(self, *lines: str) -> None:
        """Add lines at the end of the file."""
        if self.path is None:
            self.kept += lines
            return
        text = "".join(f"{encodable(line)}\n" for line in lines)
        # Opened for each message, so that no file stays open when a sweep goes to its next folder.
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def stamped(line: str) -> str:
    """Return a line with the time before it."""
    return f"{time.strftime(TIME)} {line}"


def log_files() -> list[LogFile]:
    """Return the log files of this process: one in a program, none in somebody else's."""
    handlers = [*logging.getLogger().handlers, *logging.getLogger("moco").handlers]
    return [handler for handler in handlers if isinstance(handler, LogFile)]


def open_log_files(folder: Path) -> None:
    """Let the process's log file write to its run folder."""
    for file in log_files():
        file.open(folder)


def write_to_log_files(line: str) -> None:
    """Add a line that was printed, and not logged, to the process's log file."""
    for file in log_files():
        file.write(stamped(line))
