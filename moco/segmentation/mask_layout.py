"""The folders that a dataset with masks has to have.

torch is not imported, so that a wrong folder shows at once.
"""

from pathlib import Path

from moco.data.sources.split_folders import (
    TRAINING_FOLDERS,
    VALIDATION_FOLDERS,
    first_of,
    folders_in,
)
from moco.errors import InputError, near_path


def check_layout(root: str, *, is_trained_on: bool, part: str | None = None) -> None:
    """Check that a folder holds images and masks, and images to train on.

    Args:
        root: the dataset's folder.
        is_trained_on: whether images/val needs images/train beside it.
        part: the folder that takes the place of images/val; None: there is none.

    Raises:
        InputError: a folder is missing. The message names it, and where the images seem to be.
    """
    if not Path(root).is_dir():
        raise InputError(f"data.root={root}: no such folder{near_path(root)}")
    for name in ("images", "masks"):
        if not Path(root, name).is_dir():
            raise InputError(
                f"data.root={root}: there is no folder {name} in it; "
                f"expected the folders images and masks{other_layout(root)}"
            )
    folders = folders_in(Path(root, "images"))
    validation = part if part in folders else first_of(folders, VALIDATION_FOLDERS)
    if is_trained_on and validation and not first_of(folders, TRAINING_FOLDERS):
        raise InputError(
            f"data.root={root}: there is a folder images/{validation}, but none to "
            f"train on; expected images/{' or images/'.join(TRAINING_FOLDERS)}"
        )


def other_layout(root: str) -> str:
    """Return the end of a message that tells of images on another level, or nothing."""
    for part in folders_in(root):
        if Path(root, part, "images").is_dir():
            return f"; {part}/images is there: expected images/{part} and masks/{part}"
    folder = Path(root)
    for above in (folder.parent, folder.parent.parent):
        if (above / "images").is_dir() and (above / "masks").is_dir():
            return f"; they are in data.root={above}"
    return ""
