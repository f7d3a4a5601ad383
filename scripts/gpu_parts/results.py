"""The folder of results, with a JSON file for each part and one with all parts."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco.errors import InputError

MERGED = "gpu_check.json"

MEASURED, FAILED, ABSENT = "measured", "failed", "absent"
"""States of a result. ``failed`` has an ``error`` of one line. ``absent``, for a peer that is not
available, has a ``note``."""

Result = dict[str, Any]
"""The result of a row: ``case``, ``contender``, ``unit``, ``state`` and mostly ``value``."""


class PartFile:
    """The results of one part.

    Args:
        folder: the folder of all parts.
        part: its name.
        start: the results if there is no file yet.
    """

    def __init__(self, folder: Path, part: str, start: Mapping[str, Any] | None = None) -> None:
        self.path = folder / f"{part}.json"
        self.log = folder / f"{part}.log"
        self.content: dict[str, Any] = {
            "part": part,
            "complete": False,
            "out_of_time": False,
            "running": None,
            "seconds": 0.0,
            "attempts": {},
            "rows": [],
            **(start or {}),
        }
        self.read()

    def read(self) -> None:
        """Read what the part's process has written."""
        if self.path.exists():
            self.content = read_json(self.path)

    def write(self) -> None:
        write_json(self.path, self.content)

    @property
    def is_complete(self) -> bool:
        return bool(self.content["complete"])

    @property
    def rows(self) -> list[Result]:
        return self.content["rows"]

    @property
    def cases(self) -> set[str]:
        """Return the cases that are done."""
        return {row["case"] for row in self.rows}

    def attempts(self, case: str) -> int:
        """Return how often the case was started."""
        return self.content["attempts"].get(case, 0)

    def begin(self, case: str) -> None:
        """Note that the case is being measured. The note remains if the process ends."""
        self.content["attempts"][case] = self.attempts(case) + 1
        self.content["running"] = case
        self.write()

    def finish(self, results: list[Result]) -> None:
        """Keep the results of the case that was started."""
        self.rows.extend(results)
        self.content["running"] = None
        self.write()

    def forget(self, cases: set[str]) -> None:
        """Drop the results of cases, which are to be measured again."""
        kept = [row for row in self.rows if row["case"] not in cases]
        self.content = {**self.content, "rows": kept, "attempts": {}, "complete": False}
        self.write()


class Folder:
    """The results of all parts.

    Args:
        path: the folder; it is created if needed.
        parts: the names of all parts.
        is_rehearsal: whether the results come from a rehearsal.

    Raises:
        InputError: the folder holds results of the other kind, or files that cannot be read.
    """

    def __init__(self, path: Path, parts: list[str], is_rehearsal: bool) -> None:
        self.path = path
        merged = read_json(path / MERGED) if (path / MERGED).exists() else {}
        if merged and merged["rehearsal"] != is_rehearsal:
            kind = "a rehearsal" if merged["rehearsal"] else "a GPU"
            raise InputError(f"--output {path}: it holds results of {kind}; choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        self.is_rehearsal = is_rehearsal
        self.machine: dict[str, Any] = merged.get("machine", {})
        # The merged file alone is enough to go on, on another machine for instance.
        known = merged.get("parts", {})
        self.parts = {part: PartFile(path, part, known.get(part)) for part in parts}

    def of_machine(self, machine: dict[str, Any]) -> None:
        """Note the machine of this start.

        Raises:
            InputError: earlier results come from another device or another version of torch.
        """
        for name in ("device", "torch"):
            before = self.machine.get(name, machine[name])
            if before != machine[name]:
                raise InputError(
                    f"--output {self.path}: its results come from {name} {before}, "
                    f"and here it is {machine[name]}; choose another folder"
                )
        self.machine = machine

    def results(self) -> list[Result]:
        """Return all rows so far, each with its part."""
        return [{"part": part, **row} for part, file in self.parts.items() for row in file.rows]

    def merge(self) -> dict[str, Any]:
        """Write the file that has all parts; return its content."""
        parts = {part: file.content for part, file in self.parts.items()}
        content = {"rehearsal": self.is_rehearsal, "machine": self.machine, "parts": parts}
        write_json(self.path / MERGED, content)
        return content


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a file of results.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable file of results ({error})") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at once: a process that is ended while it writes leaves the old one."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
