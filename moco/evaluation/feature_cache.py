"""Features that are kept from one evaluation to the next.

The name of a file holds a key of everything that the features depend on, so a changed checkpoint,
setting or image leads to a new file.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moco.data.files.archives import DAMAGED
from moco.data.sources.source import ArrayImages, FileImages, Labelled
from moco.runs.atomic_files import write_atomically
from moco.runs.run_folder import CONFIG

log = logging.getLogger(__name__)

# Images in memory that are hashed at once.
IMAGES_AT_ONCE = 1024

Arrays = dict[str, Any]
"""NumPy arrays by name."""


class FeatureCache:
    """The files of one checkpoint.

    They are in ``features/`` of the checkpoint's run folder. For a checkpoint in no run folder they
    are in ``$XDG_CACHE_HOME/moco/features`` (``~/.cache``).

    Args:
        checkpoint: the file of weights.
        settings: everything else that the features depend on, as plain data.
    """

    def __init__(self, checkpoint: Path, settings: Mapping[str, Any]) -> None:
        # Mapped, because a checkpoint may have gigabytes.
        content: Any = np.memmap(checkpoint, mode="r")
        self.digest = hashlib.sha256(content).hexdigest()
        self.settings = json.dumps(settings, sort_keys=True)
        self.stem = checkpoint.stem
        folder = checkpoint.absolute().parent
        self.is_in_run = folder.name == "checkpoints" and (folder.parent / CONFIG).is_file()
        if self.is_in_run:
            self.folder = folder.parent / "features"
        else:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            self.folder = Path(cache) / "moco" / "features"

    def path(self, labelled: Labelled, root: Any) -> Path:
        """Return where the features of these images belong.

        Args:
            labelled: the images.
            root: of the dataset. Its files are part of the key if the images do not name theirs.
        """
        key = hashlib.sha256(f"{self.digest} {self.settings} ".encode())
        key.update(labelled.labels.tobytes())
        for part in image_traits(labelled, root):
            key.update(part)
        return self.folder / f"{self.stem}-{self.digest[:12]}-{key.hexdigest()[:24]}.npz"

    def kept_or(self, path: Path, compute: Callable[[], Arrays]) -> Arrays:
        """Return the arrays in the file. If it is missing or damaged, compute and keep them.

        There is a warning if the folder cannot be written to. In a run folder, files of an earlier
        content of the checkpoint are removed.
        """
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as archive:
                    arrays = dict(archive)
                log.info("features from %s", path)
                return arrays
            except DAMAGED as error:
                log.warning("%s is damaged (%s): computing the features again", path, error)
        arrays = compute()
        try:
            write_atomically(path, lambda file: np.savez(file, **arrays))
            if self.is_in_run:
                self._remove_old_files()
        except OSError as error:
            log.warning("features are not kept for the next evaluation: %s", error)
        return arrays

    def _remove_old_files(self) -> None:
        # All that differ from our pattern are the user's own files.
        digest = f"(?!{self.digest[:12]})[0-9a-f]{{12}}"
        pattern = re.compile(f"{re.escape(self.stem)}-{digest}-[0-9a-f]{{24}}[.]npz")
        for path in self.folder.iterdir():
            if pattern.fullmatch(path.name):
                path.unlink(missing_ok=True)


def image_traits(labelled: Labelled, root: Any) -> Iterable[Any]:
    """Yield what identifies the images, as bytes or arrays.

    These are pixels of images in memory, and name, size and time of change of files.
    """
    images = labelled.images
    if isinstance(images, ArrayImages):
        yield str(images.tensor.shape).encode()
        # In parts: grey images share one channel three times, and a copy has it all.
        for part in images.tensor.split(IMAGES_AT_ONCE):
            yield part.contiguous().numpy()
    elif isinstance(images, FileImages):
        for part in (images.text, images.ends, images.page_ends):
            yield part.numpy()
        for path in images.files():
            yield file_stamp(path)
    else:
        for index in range(len(images)):
            yield images.name(index).encode("utf-8", "surrogateescape") + b"\n"
        if root is None:  # a dataset of the user's own
            return
        # These images do not tell which files they are in, so all files of the dataset count.
        for folder, _, names in sorted(os.walk(root)):
            for name in sorted(names):
                yield file_stamp(os.path.join(folder, name))


def file_stamp(path: str) -> bytes:
    """Return a file's name, size and time of change."""
    stamp = None
    if os.path.exists(path):
        status = os.stat(path)
        stamp = status.st_size, status.st_mtime_ns
    return f"{path!r} {stamp}\n".encode()
