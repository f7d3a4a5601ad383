"""Where a program may write: not into what it reads."""

import os
from pathlib import Path
from typing import Any

from moco.errors import InputError, printable
from moco.runs.run_folder import CONFIG

ADVICE = "choose another hydra.run.dir=PATH"


def check_folder(config: Any, folder: Path) -> None:
    """Raise InputError if the run folder is among the images, or is the checkpoint's run folder.

    A program that is started among the images may write below them: what our programs wrote is
    never listed as images.

    Args:
        config: of the program, an instance of its schema.
        folder: the run folder.
    """
    place = folder.resolve()
    here = Path.cwd()
    root = getattr(getattr(config, "data", None), "root", None)
    for read in root if isinstance(root, list) else [root]:
        if not isinstance(read, str) or not os.path.isdir(read):
            continue
        images = Path(read).resolve()
        is_below = images in place.parents and images not in (here, *here.parents)
        if place == images or is_below:
            where = printable(f"hydra.run.dir={folder}: lies in data.root={read}")
            raise InputError(f"{where}, among the images; {ADVICE}")
    checkpoint = getattr(config, "checkpoint", None)
    if isinstance(checkpoint, str):
        run = Path(checkpoint).resolve().parent.parent
        if run == place and (run / CONFIG).is_file():
            where = printable(f"hydra.run.dir={folder}: is the run of checkpoint={checkpoint}")
            raise InputError(f"{where}, which would be overwritten; {ADVICE}")
