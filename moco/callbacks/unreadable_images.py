"""The list of images that a run could not read, in its run folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from moco.runs.atomic_files import write_atomically
from moco.training.distributed.collectives import gather_objects

UNREADABLE = "unreadable_images.jsonl"


def write_unreadable(folder: Path, names: Iterable[str]) -> None:
    r"""Write the names, sorted, to ``unreadable_images.jsonl``: in each line one, as a JSON string in ASCII.

    So a name may hold newlines and bytes that are no UTF-8 (255 stands there as ``\udcff``), and what ``json.loads`` makes
    of a line is the path that ``open`` takes. Replaces an older list; without names nothing is written.
    """
    text = "".join(json.dumps(name) + "\n" for name in sorted(names))
    if text:
        write_atomically(folder / UNREADABLE, lambda file: file.write(text.encode("ascii")))


class UnreadableList(pl.Callback):
    """Brings together what every process could not read, at each checkpoint and epoch's end, and writes the list.

    Args:
        folder: the run folder.
        figures: gets ``unreadable_images``, how many there are so far.
    """

    def __init__(self, folder: Path, figures: dict[str, Any]) -> None:
        self.folder = folder
        self.figures = figures

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own: the data module, which Lightning asks next, holds the set."""
        self._bring_together()
        return {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bring_together()

    def _bring_together(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.unreadable.update(
            *gather_objects(data.unreadable)
        )  # in place: a loader adds to the same set
        self.figures["unreadable_images"] = len(data.unreadable)
        if self.trainer.is_global_zero:
            write_unreadable(self.folder, data.unreadable)
