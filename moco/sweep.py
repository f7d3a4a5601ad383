"""Print a table of a sweep's jobs: ``python -m moco.sweep runs/sweep/NAME [--csv FILE]``."""

import argparse
import sys
from pathlib import Path

from moco.cli.sweep_table import as_csv, as_text, find_jobs
from moco.errors import InputError, printable


def main() -> None:
    """Entry point of ``moco-sweep``."""
    parser = argparse.ArgumentParser(prog="moco.sweep", description="A table of a sweep's jobs.")
    parser.add_argument("folder", type=Path, help="of the sweep, for instance runs/sweep/NAME")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="also write the table with every figure there"
    )
    given = parser.parse_args()

    from moco.runs.run_folder import write_atomically

    try:
        jobs = find_jobs(given.folder)
        print(as_text(jobs))
        if given.csv:
            write_atomically(given.csv, lambda file: file.write(as_csv(jobs).encode()))
    except (InputError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
