"""What a checkpoint holds of the images it was trained on, and what a change of them means."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

KEY = "training_set"
"""Of the checkpoint's item. Checkpoints of earlier versions have none."""
MOST_NAMES = 5_000_000
"""Of more images only the number is kept: hashing their names would take many seconds."""


@dataclass(frozen=True)
class TrainingSet:
    """The images of a training."""

    num_images: int
    """How many images there are."""
    names: str | None
    """Digest of their names, whatever the order; None if they are too many."""
    steps_per_epoch: int
    """Optimizer steps in an epoch."""

    def as_plain_data(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return asdict(self)

    def is_changed(self, then: "TrainingSet") -> bool:
        """Return whether these are other images than those of `then`."""
        if self.num_images != then.num_images:
            return True
        return None not in (self.names, then.names) and self.names != then.names


def training_set(
    names: Callable[[], Iterable[str]], num_images: int, batch_size: int, root: Any
) -> TrainingSet:
    """Return the training set of images with these names.

    Args:
        names: returns those of the images, or of what holds them.
        num_images: how many images there are.
        batch_size: images per optimizer step. The last ones of an epoch that fill no batch are left
            out.
        root: ``data.root``. A name is hashed without it, so that a dataset may be moved.
    """
    digest = None
    if num_images <= MOST_NAMES:
        start = root.rstrip("/") + "/" if isinstance(root, str) else ""
        in_order = sorted(name.removeprefix(start) for name in names())
        text = "\0".join(in_order).encode(errors="surrogatepass")
        digest = hashlib.blake2b(text, digest_size=16).hexdigest()
    return TrainingSet(num_images, digest, num_images // batch_size)


def from_checkpoint(content: dict[str, Any]) -> TrainingSet | None:
    """Return the training set of a checkpoint, or None if it does not say it."""
    item = content.get(KEY)
    if not isinstance(item, dict):
        return None
    num_images, steps = item.get("num_images"), item.get("steps_per_epoch")
    if not isinstance(num_images, int) or not isinstance(steps, int):
        return None
    return TrainingSet(num_images, item.get("names"), steps)


def change_in_words(then: TrainingSet, now: TrainingSet) -> str:
    """Return how the images differ, and the steps of an epoch if they do."""
    difference = now.num_images - then.num_images
    kind = "more" if difference > 0 else "fewer"
    words = f"{now.num_images:,} images instead of {then.num_images:,} ({abs(difference):,} {kind})"
    if difference == 0:
        words = f"as many images as before, {now.num_images:,}"
        if now.is_changed(then):
            words += ", but not the same ones"
    if now.steps_per_epoch != then.steps_per_epoch:
        words += (
            f", so that an epoch has {counted(now.steps_per_epoch, 'step')} instead of "
            f"{then.steps_per_epoch:,}"
        )
    return words


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in singular or plural."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
