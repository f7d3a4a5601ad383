"""Print a table of a sweep's jobs: ``python -m moco.sweep runs/sweep/NAME [--csv FILE]``."""

import argparse
import sys
from pathlib import Path

from moco.cli.help_pages import answer_question
from moco.cli.sweep_table import as_csv, as_text, find_jobs
from moco.errors import InputError, encodable, printable
from moco.screen import let_stdout_escape, show_error


def main() -> None:
    """Entry point of ``moco-sweep``."""
    if answer_question("sweep", sys.argv[1:]):
        return
    # `answer_question` has the texts of the help page.
    parser = argparse.ArgumentParser(prog="moco.sweep", add_help=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path, metavar="FILE")
    given = parser.parse_args()

    from moco.runs.atomic_files import write_atomically

    try:
        jobs = find_jobs(given.folder)
        let_stdout_escape()
        print(encodable(as_text(jobs)))
        if given.csv:
            table = encodable(as_csv(jobs))
            write_atomically(given.csv, lambda file: file.write(table.encode()))
    except (InputError, OSError) as error:
        show_error(printable(f"error: {error}"))
        sys.exit(2)


if __name__ == "__main__":
    main()
