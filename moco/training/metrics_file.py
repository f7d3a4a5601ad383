"""The scalars of a run as a table: ``metrics.csv`` in the run folder."""

import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from moco.errors import encodable
from moco.runs.atomic_files import write_atomically
from moco.training.stopwatches import LOGGING, epoch_time

NAME = "metrics.csv"
STEP = "step"
SECONDS_UNSAVED = 10.0


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger without sub-folders, with a table that goes on after a resume.

    Lightning's own table is deleted when a run resumes, and is rewritten in place for each new
    column, so that a crash can lose all of it.

    Args:
        folder: the run folder.
        last_step: the resumed run goes on after this optimizer step. Rows of later steps, which an
            earlier process wrote, are dropped. None: the table begins anew.
    """

    def __init__(self, folder: Path, last_step: int | None = None) -> None:
        super().__init__(save_dir=str(folder), name="", version="")
        self._table: MetricsTable | None = None
        self._last_step = last_step

    @property
    def experiment(self) -> Any:
        """The table. Only rank 0 asks for it."""
        if self._table is None:
            self._table = MetricsTable(Path(self.save_dir) / NAME, self._last_step)
        return self._table

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: ``.hydra/config.yaml`` holds all settings."""

    @rank_zero_only
    @epoch_time.measured(LOGGING)
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.add(step or 0, metrics)

    @rank_zero_only
    @epoch_time.measured(LOGGING)
    def save(self) -> None:
        self.experiment.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        # Without a table nothing was logged.
        if self._table is not None:
            self._table.save()


class MetricsTable:
    """A CSV file with one row per step and one column per figure.

    Rows are written in blocks. The last row stays in memory as well, because later figures may
    belong to the same step; the next block then replaces it. A new column, or a figure of an
    earlier step, means that the whole file is written anew, and it replaces the old one at once.

    Args:
        path: the file.
        last_step: see `MetricsFile`.
    """

    def __init__(self, path: Path, last_step: int | None) -> None:
        self.path = path
        self.columns = [STEP]
        self.unsaved: dict[int, dict[str, Any]] = {}
        """The rows that the file lacks, and its last row; by step."""
        self.has_changed = False
        self.end = 0
        """Where the last row begins in the file, bytes."""
        self.last_step = -1
        """The step of the last row in the file."""
        self.saved_at = time.monotonic()
        rows = []
        if last_step is not None and path.is_file():
            rows = self._read(last_step)
        self._write_all(rows)

    def add(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add figures to the row of a step; save if the last time was ten seconds ago."""
        row = self.unsaved.setdefault(step, {STEP: step})
        for name, figure in figures.items():
            row[encodable(name)] = float(figure)
        self.has_changed = True
        if time.monotonic() - self.saved_at > SECONDS_UNSAVED:
            self.save()

    def save(self) -> None:
        """Write what the file lacks."""
        self.saved_at = time.monotonic()
        if not self.has_changed:
            return
        self.has_changed = False
        rows = [self.unsaved[step] for step in sorted(self.unsaved)]
        new_columns = [name for row in rows for name in row if name not in self.columns]
        # Lightning gives the figures of `self.log` to the step before, whose row may be in the file
        # already.
        is_late = rows[0][STEP] < self.last_step
        if new_columns or is_late:
            self.columns += dict.fromkeys(new_columns)
            self._write_all(self._merged(rows))
            return
        *complete, last = rows
        before, after = self._text(complete), self._text([last])
        with self.path.open("r+b") as file:
            file.seek(self.end)
            file.write(before + after)
            file.truncate()
        self._keep(last, self.end + len(before))

    def _merged(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the file's rows together with `rows`, one for each step."""
        with self.path.open("rb") as file:
            complete = file.read(self.end).decode("utf-8")
        by_step: dict[int, dict[str, Any]] = {}
        for row in [*csv.DictReader(io.StringIO(complete)), *rows]:
            step = int(row[STEP])
            by_step[step] = {**by_step.get(step, {}), **row, STEP: step}
        return [by_step[step] for step in sorted(by_step)]

    def _read(self, last_step: int) -> list[dict[str, Any]]:
        """Return the rows up to a step. What a crash has left half-written is dropped."""
        rows = []
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(file)
            names = [name for name in reader.fieldnames or [] if name != STEP]
            self.columns += names
            for row in reader:
                is_whole = None not in row and None not in row.values()
                step = row.get(STEP) or ""
                if is_whole and step.isdecimal() and int(step) <= last_step:
                    rows.append({**row, STEP: int(step)})
        return rows

    def _write_all(self, rows: Sequence[dict[str, Any]]) -> None:
        """Replace the file."""
        header = io.StringIO(newline="")
        csv.writer(header, lineterminator="\n").writerow(self.columns)
        before = header.getvalue().encode() + self._text(rows[:-1])
        after = self._text(rows[-1:])
        write_atomically(self.path, lambda file: file.write(before + after))
        self._keep(rows[-1] if rows else None, len(before))

    def _text(self, rows: Sequence[dict[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()

    def _keep(self, last: dict[str, Any] | None, end: int) -> None:
        """Remember the file's last row, and where it begins."""
        self.end = end
        self.unsaved = {}
        if last is not None:
            self.last_step = last[STEP]
            self.unsaved[self.last_step] = last
