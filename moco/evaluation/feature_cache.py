"""Features that are kept from one evaluation to the next, under a key of everything that they depend on.

A file is used only if its name holds the key of what is asked for now, so a changed checkpoint, setting or image makes
a new one. Letters: M images.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moco.data.files.archives import DAMAGED
from moco.data.sources.registry import ArrayImages, FileImages, Labelled
from moco.runs.atomic_files import write_atomically
from moco.runs.run_folder import CONFIG

log = logging.getLogger(__name__)


class FeatureCache:
    """The files of one checkpoint.

    They lie in ``features/`` of the checkpoint's run folder, else in ``$XDG_CACHE_HOME/moco/features`` (``~/.cache``).

    Args:
        settings: whatever else the features depend on, as plain data.
    """

    def __init__(self, checkpoint: Path, settings: Mapping[str, Any]) -> None:
        self.digest = digest_of_file(checkpoint)
        self.settings = json.dumps(settings, sort_keys=True)
        self.stem = checkpoint.stem
        folder = checkpoint.absolute().parent
        self.is_in_run = folder.name == "checkpoints" and (folder.parent / CONFIG).is_file()
        self.folder = folder.parent / "features" if self.is_in_run else user_folder()

    def path(self, labelled: Labelled, root: Any) -> Path:
        """Where the features of these images belong.

        Args:
            root: of the data set, whose files are looked at where the images do not tell which they are in.
        """
        key = hashlib.sha256(f"{self.digest} {self.settings} ".encode())
        key.update(np.ascontiguousarray(labelled.labels).tobytes())
        for part in traits(labelled, root):
            key.update(part)
        return self.named(key.hexdigest())

    def named(self, key: str) -> Path:
        """Where what has this key belongs, of this checkpoint."""
        return self.folder / f"{self.stem}-{self.digest[:12]}-{key[:24]}.npz"

    def read(self, path: Path) -> dict[str, np.ndarray] | None:
        """The arrays; None if they are not there, or damaged."""
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except DAMAGED as error:
            log.warning("%s is damaged (%s): embedding again", path, error)
            return None

    def write(self, path: Path, arrays: Mapping[str, Any]) -> None:
        """Keep the arrays, if the folder can be written to; in a run folder those of the checkpoint's former state go."""
        try:
            write_atomically(path, lambda file: np.savez(file, **arrays))
            if self.is_in_run:
                self._remove_former()
        except OSError as error:
            log.warning("features are not kept for the next evaluation: %s", error)

    def _remove_former(self) -> None:
        """Of this checkpoint file with another content; whatever else lies there is not ours."""
        ours = re.compile(re.escape(self.stem) + "-([0-9a-f]{12})-[0-9a-f]{24}[.]npz")
        for other in self.folder.iterdir():
            name = ours.fullmatch(other.name)
            if name and name[1] != self.digest[:12]:
                other.unlink(missing_ok=True)


def user_folder() -> Path:
    """For checkpoints that lie in no run folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moco" / "features"


def digest_of_file(path: Path) -> str:
    """SHA-256 of the content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def traits(labelled: Labelled, root: Any) -> Iterable[bytes]:
    """What the images are: those in memory by their pixels, files by name, size and time of change."""
    images = labelled.images
    if isinstance(images, ArrayImages):
        yield str(images.tensor.shape).encode()
        yield from (image.numpy().tobytes() for image in images.tensor.split(4096))
        return
    if isinstance(images, FileImages):
        yield images.text.numpy().tobytes()
        yield images.ends.numpy().tobytes()
        yield b"" if images.page_ends is None else images.page_ends.numpy().tobytes()
        yield from (stamp(path) for path in images.files())
        return
    yield from (
        images.name(index).encode("utf-8", "surrogateescape") + b"\n"
        for index in range(len(images))
    )
    for folder, _, names in sorted(os.walk(root)):
        yield from (stamp(os.path.join(folder, name)) for name in sorted(names))


def stamp(path: str) -> bytes:
    """Size and time of change of a file, and its name."""
    status = os.stat(path) if os.path.exists(path) else None
    return f"{path!r} {status and (status.st_size, status.st_mtime_ns)}\n".encode()
