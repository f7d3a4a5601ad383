"""Where a program may write: not into what it reads."""

import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from moco.errors import InputError, printable
from moco.runs.run_folder import CONFIG


def chosen_folders() -> list[str]:
    """Return the overrides by which the user has chosen the run folder."""
    given = HydraConfig.get().overrides.hydra
    return [item for item in given if item.startswith(("hydra.run.dir", "hydra.sweep."))]


def check_folder(config: Any, folder: Path) -> None:
    """Raise InputError if the run folder is among the images, or is the checkpoint's run folder.

    A folder of ``runs/`` that nobody has named may be among the images, as when a program is
    started there: what our programs wrote is never listed as images.

    Args:
        config: of the program, an instance of its schema.
        folder: the run folder.
    """
    if not chosen_folders():
        return
    advice = "; choose another hydra.run.dir=PATH"
    place = folder.resolve()
    root = getattr(getattr(config, "data", None), "root", None)
    for read in root if isinstance(root, list) else [root]:
        if isinstance(read, str) and os.path.isdir(read):
            data = Path(read).resolve()
            if place == data or data in place.parents:
                raise InputError(
                    printable(f"hydra.run.dir={folder}: lies in data.root={read}, the images")
                    + advice
                )
    checkpoint = getattr(config, "checkpoint", None)
    if isinstance(checkpoint, str):
        run = Path(checkpoint).resolve().parent.parent
        if run == place and (run / CONFIG).is_file():
            raise InputError(
                printable(f"hydra.run.dir={folder}: is the run of checkpoint={checkpoint}, which ")
                + "would be overwritten"
                + advice
            )
