"""The project's log: one line per message on stdout, without the chatter of libraries."""

import io
import logging
import sys
import warnings

# Warnings of libraries that say nothing a user could act on.
IGNORED_WARNINGS = (
    ".*does not have many workers.*",
    ".*number of training batches.*smaller than the logging interval.*",
    ".*srun.*available on your system.*",
    ".*GPU available but not used.*",
    # moco.segment with freeze_backbone=true keeps the backbone in eval mode on purpose.
    ".*in eval mode at the start of training.*",
    ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
)


class StdoutHandler(logging.StreamHandler):
    """Writes to the current ``sys.stdout``, which a live progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def is_for_users(record: logging.LogRecord) -> bool:
    """Whether a record is ours, or at least a warning of a library."""
    return record.name.startswith("moco") or record.levelno >= logging.WARNING


def set_up_logging() -> None:
    """Send the project's log and the warnings of libraries to stdout.

    stderr is left for the one line that says why the program ended.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names can hold bytes that no encoding has.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = StdoutHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    # A filter instead of levels: Lightning resets the levels of its loggers when it is imported.
    handler.addFilter(is_for_users)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)
