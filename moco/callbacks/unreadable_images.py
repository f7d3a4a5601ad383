"""The list of images that a run could not read, in its run folder."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from moco.evaluation.resumable_features import json_lines
from moco.runs.atomic_files import write_atomically
from moco.training.distributed.collectives import gather_objects

UNREADABLE = "unreadable_images.jsonl"


def write_unreadable(folder: Path, names: Iterable[str]) -> None:
    r"""Write the sorted names to ``unreadable_images.jsonl``, one JSON string of ASCII a line.

    A name may hold newlines and bytes that are not UTF-8 (byte 255 is written as ``\udcff``).
    ``json.loads`` of a line gives the path that ``open`` takes. An older list is replaced; without
    names nothing is written.
    """
    content = json_lines(sorted(names))
    if content:
        write_atomically(folder / UNREADABLE, lambda file: file.write(content))


class UnreadableList(pl.Callback):
    """Collect what each process could not read, at each checkpoint and epoch's end, and write it.

    Args:
        folder: the run folder.
        figures: gets ``unreadable_images``, the number of unreadable images so far.
    """

    def __init__(self, folder: Path, figures: dict[str, Any]) -> None:
        self.folder = folder
        self.figures = figures

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module, which Lightning asks next, saves the names."""
        self._collect()
        return {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._collect()

    def _collect(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        # In place, because a loader adds to the same set.
        data.unreadable.update(*gather_objects(data.unreadable))
        self.figures["unreadable_images"] = len(data.unreadable)
        if self.trainer.is_global_zero:
            write_unreadable(self.folder, data.unreadable)
